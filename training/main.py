"""Train LaTtE-Flow.

    deepspeed training/main.py --deepspeed ds_configs/zero2.json [--config training/configs/X.yaml] [--any.field value]

The same command again resumes the run in its output_dir. A run that was asked to stop ends with 75 (training/preemption.py).
"""

import os
import sys

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from training.config import parse_config
from training.errors import exit_code
from training.preemption import EXIT_STOPPED
from training.trainer import Trainer


def main() -> None:
    """Parse, build, train."""
    config = parse_config()
    # Before anything asks for the current device: DeepSpeed itself sets it only when it builds the engine.
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    deepspeed.init_distributed()
    try:
        if not Trainer(config).train():
            sys.exit(EXIT_STOPPED)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(exit_code(main))
