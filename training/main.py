"""Train LaTtE-Flow.

    deepspeed training/main.py --deepspeed ds_configs/zero2.json [--config training/configs/X.yaml] [--any.field value]

The same command again resumes the run in its output_dir.
"""

import sys

import deepspeed
import torch.distributed as dist

from training.config import parse_config
from training.errors import exit_code
from training.trainer import Trainer


def main() -> None:
    """Parse, build, train."""
    config = parse_config()
    deepspeed.init_distributed()
    try:
        Trainer(config).train()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(exit_code(main))
