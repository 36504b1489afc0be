"""Writing and reading DeepSpeed's files: a failed write does not end the run, and reading executes no code."""

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

from latte_flow.training.checkpoint.formats.source import check_dense
from latte_flow.training.errors import UserError

ALLOWED_GLOBALS = [LossScaler, ZeroStageEnum, fragment_address]
"""Types in DeepSpeed's shards other than tensors and plain containers."""
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class TolerantCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's file writer, except that it records file system errors instead of raising them.

    Other ranks wait in collectives of the same save: a rank that raises in the middle would hang them all.
    """

    def __init__(self, config_params=None):
        super().__init__(config_params)
        self.errors: list[str] = []

    def save(self, state_dict, path: str) -> None:
        """Write a file, or record the reason it failed."""
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
            self.errors.append(f"{Path(path).name}: {str(error).splitlines()[0]}")

    def load(self, path: str, map_location=None) -> dict:
        """Read a file.

        Raises:
            ValueError: when a tensor in it is of a kind that no run has, such as sparse or quantised.
        """
        content = super().load(path, map_location)
        check_dense(path, content)
        return content

    def finish(self) -> list[str]:
        """Write pending files; return the errors since the last call."""
        errors, self.errors = self.errors, []
        return errors


class DeferringCheckpointEngine(TolerantCheckpointEngine):
    """DeepSpeed's file writer, except that it keeps a copy of the state in host memory and writes it in ``finish``."""

    def __init__(self, config_params=None):
        super().__init__(config_params)
        self._kept: list[tuple[dict, str]] = []

    def save(self, state_dict, path: str) -> None:
        """Copy the state, which training may change afterwards, or record the reason it failed."""
        try:
            self._kept.append((_copy_to_host(state_dict), path))
        except (MemoryError, RuntimeError) as error:
            self.errors.append(f"{Path(path).name}: {str(error).splitlines()[0]}")

    def finish(self) -> list[str]:
        """Write the kept state and release it; return the errors."""
        kept, self._kept = self._kept, []
        while kept:
            state, path = kept.pop(0)
            super().save(state, path)
        return super().finish()


def _copy_to_host(value):
    """Return a copy whose tensors are on the CPU and share no memory with the original."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copy_to_host(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_copy_to_host(item) for item in value)
    return copy.deepcopy(value)


@contextmanager
def safe_unpickling(source: Path) -> Iterator[None]:
    """Make every ``torch.load`` in the body, including DeepSpeed's, reject pickles that name anything but ALLOWED_GLOBALS.

    Args:
        source: path for the error message.

    Raises:
        UserError: when a file is rejected.
    """
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"  # overrides weights_only=False in DeepSpeed's own calls
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS):
            yield
    except pickle.UnpicklingError as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), error
        )
        raise UserError(
            f"{source}: holds an object that is not training state and was not executed ({reason})"
        ) from error
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before
