"""Train LaTtE-Flow.

    deepspeed training/main.py --deepspeed ds_configs/zero2.json [--config training/configs/X.yaml] [--any.field value]

Running the same command again resumes the run in its output_dir. A run that was asked to stop exits with code 75
(training/monitor/preemption.py).
With --dry_run it prints the cost of the run and exits; this needs no launcher:

    python training/main.py --dry_run --config X.yaml --assume.gpus 8
"""

import os
import sys

from latte_flow.training.monitor.launcher import launchers

# Before the imports below, which take ten seconds: a launcher that ends during them is noticed too.
STARTED_BY = launchers()

# ruff: noqa: E402
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from latte_flow.training.configs.parser import parse_command
from latte_flow.training.distributed.ranks import start_alone_without_launcher
from latte_flow.training.distributed.rendezvous import connect
from latte_flow.training.dry_run import dry_run, format_table
from latte_flow.training.errors import exit_code
from latte_flow.training.monitor.logs import protect_output
from latte_flow.training.monitor.preemption import EXIT_STOPPED
from latte_flow.training.monitor.progress import hide_library_bars
from latte_flow.training.trainer import Trainer


def main() -> None:
    """Parse the command line, then build and train the run."""
    command = parse_command()
    if command.dry_run:
        print(format_table(command.config, dry_run(command.config, command.assume), command.assume))
        return
    protect_output()
    if command.config.tensor_parallel > 1:
        # megatron-core overlaps a gradient all-reduce with a matrix product; this relies on kernels starting in launch order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    start_alone_without_launcher()
    # Before anything queries the current device: DeepSpeed itself sets it only when it builds the engine.
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # DeepSpeed creates its own process groups, which use torch's default timeouts.
    patience = command.config.health.patience
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = patience
    connect(patience)
    hide_library_bars()
    finished = Trainer(command.config, STARTED_BY).train()
    # Not in a finally: after an error on one rank, NCCL would wait for ranks stuck in a collective before the traceback prints.
    dist.destroy_process_group()
    if not finished:
        sys.exit(EXIT_STOPPED)


def run() -> int:
    """Run the command line and return its exit code (console script)."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
