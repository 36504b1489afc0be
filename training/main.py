"""Train LaTtE-Flow.

    deepspeed training/main.py --deepspeed ds_configs/zero2.json [--config training/configs/X.yaml] [--any.field value]

The same command again resumes the run in its output_dir.
"""

import os
import sys

import deepspeed
import torch.distributed as dist

from training.config import parse_config
from training.errors import UserError
from training.trainer import Trainer


def main() -> int:
    """Parse, build, train. Returns the exit code: 2 for an error that the user can mend, said in one line."""
    try:
        config = parse_config()
        deepspeed.init_distributed()
        Trainer(config).train()
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:  # every rank finds the same error
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
