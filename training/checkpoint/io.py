"""How DeepSpeed's files are written and read: a failed write does not end the run, and reading executes nothing."""

import copy
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from latte_flow.training.errors import UserError

ALLOWED_GLOBALS = [LossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed's shards hold beside tensors and plain containers."""
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class TolerantCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's writer of files, which keeps an error of the file system for later instead of raising it.

    Other ranks wait in collectives of the same save: one that leaves in the middle would hang them all.
    """

    def __init__(self, config_params=None):
        super().__init__(config_params)
        self.errors: list[str] = []

    def save(self, state_dict, path: str) -> None:
        """Write a file, or note why it could not be written."""
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
            self.errors.append(f"{Path(path).name}: {str(error).splitlines()[0]}")

    def finish(self) -> list[str]:
        """Write what has not been written yet; return the errors since the last call."""
        errors, self.errors = self.errors, []
        return errors


class DeferringCheckpointEngine(TolerantCheckpointEngine):
    """DeepSpeed's writer of files, which keeps a copy of what is to be written, in the host's memory, until ``finish``."""

    def __init__(self, config_params=None):
        super().__init__(config_params)
        self._kept: list[tuple[dict, str]] = []

    def save(self, state_dict, path: str) -> None:
        """Copy the state, which training may change afterwards, or note why it could not be copied."""
        try:
            self._kept.append((_copy_to_host(state_dict), path))
        except (MemoryError, RuntimeError) as error:
            self.errors.append(f"{Path(path).name}: {str(error).splitlines()[0]}")

    def finish(self) -> list[str]:
        """Write what was kept, and let go of it; return the errors."""
        kept, self._kept = self._kept, []
        while kept:
            state, path = kept.pop(0)
            super().save(state, path)
        return super().finish()


def _copy_to_host(value):
    """Return a copy whose tensors are on the CPU and share nothing with the original."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copy_to_host(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_copy_to_host(item) for item in value)
    return copy.deepcopy(value)


@contextmanager
def safe_unpickling(source: Path) -> Iterator[None]:
    """Make every ``torch.load`` inside, DeepSpeed's too, refuse pickles that name anything but ALLOWED_GLOBALS.

    Args:
        source: for the message.

    Raises:
        UserError: when a file is refused.
    """
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"  # it overrules the weights_only=False of DeepSpeed's own calls
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS):
            yield
    except pickle.UnpicklingError as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), error
        )
        raise UserError(
            f"{source}: holds something that is no training state, and was not executed ({reason})"
        ) from error
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before
