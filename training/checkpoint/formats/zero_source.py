"""The ZeRO shards of a DeepSpeed checkpoint behind the same interface as the exported formats."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latte_flow.model.files import reading
from latte_flow.training.checkpoint.formats.source import (
    EMA,
    MODEL,
    TensorInfo,
    TrainingState,
    WeightSource,
    kinds_of_training,
    trained_step,
)
from latte_flow.training.checkpoint.formats.zero_shards import OPTIMIZER_SUFFIX, ZeroShards
from latte_flow.training.checkpoint.io import safe_unpickling
from latte_flow.training.optimizer import EMA_KEY

SHARDS = f"*{OPTIMIZER_SUFFIX}"
NOT_OURS = ("module", "optimizer", "param_shapes")


class ZeroSource(WeightSource):
    """Reads the shards of one step.

    Args:
        path: a folder of DeepSpeed's files. A manifest next to them is not checked here.

    Raises:
        UserError: when shards are missing, damaged or of different steps.
    """

    def __init__(self, path: Path):
        self.path = path
        with safe_unpickling(path), reading(path):
            self._shards = shards = ZeroShards(path)
            self._untrained = shards.untrained
        states = shards.model_states
        self.format = f"deepspeed-zero-{shards.stage}"
        self.world_size = shards.world_size
        self.step = trained_step(states)
        self.kinds = kinds_of_training(shards.state_keys)
        self.training_state = TrainingState(
            shapes=shards.shapes,
            state_keys=shards.state_keys,
            updates=shards.updates,
            model_states={key: value for key, value in states.items() if key not in NOT_OURS},
            optimizer={"param_groups": shards.param_groups, "ds_version": states["ds_version"]},
        )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        infos = {name: TensorInfo(shape, torch.float32) for name, shape in self._shards.shapes.items()}
        return infos | self._untrained

    def _read(self, name: str, kind: str) -> Tensor:
        if name in self._untrained:
            return self._shards.read_untrained(name).clone()
        return self._shards.read(name, None if kind == MODEL else kind)


assert EMA == EMA_KEY  # exported weights use the optimizer's name for its state
