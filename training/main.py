"""Train LaTtE-Flow.

    deepspeed training/main.py --deepspeed ds_configs/zero2.json [--config training/configs/X.yaml] [--any.field value]

The same command again resumes the run in its output_dir. A run that was asked to stop ends with 75 (training/preemption.py).
With --dry_run it prints what the run would cost and stops; that needs no launcher:

    python training/main.py --dry_run --config X.yaml --assume.gpus 8
"""

import os
import sys

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from training.command_line import parse_command
from training.dry_run import dry_run, format_table
from training.errors import exit_code
from training.preemption import EXIT_STOPPED
from training.trainer import Trainer


def main() -> None:
    """Parse, build, train."""
    command = parse_command()
    if command.dry_run:
        print(format_table(command.config, dry_run(command.config, command.assume), command.assume))
        return
    if command.config.tensor_parallel > 1:
        # megatron-core hides the sum of a gradient over ranks behind a matrix product, where kernels start in the order of calls.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Before anything asks for the current device: DeepSpeed itself sets it only when it builds the engine.
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # DeepSpeed makes groups of its own, which take torch's defaults.
    patience = command.config.health.patience
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = patience
    deepspeed.init_distributed(timeout=patience)
    finished = Trainer(command.config).train()
    # Only here: after an error on one rank NCCL would wait, before the traceback is out, for others that wait in a collective.
    dist.destroy_process_group()
    if not finished:
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    sys.exit(exit_code(main))
