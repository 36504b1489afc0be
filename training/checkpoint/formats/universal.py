"""DeepSpeed's universal checkpoint: every parameter and optimizer state unsharded, each in its own file.

    zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt     a trained parameter; ema.pt is our addition
    zero/optimizer_state.pt                                   the optimizer's settings
    mp_rank_00_model_states.pt                                the model's weights in their own dtype, frozen weights, counters

``deepspeed.checkpoint.ds_to_universal`` writes the same without ema.pt, which it does not know.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latte_flow.model.files import reading
from latte_flow.model.tensor_split import join_parts
from latte_flow.training.checkpoint.formats.source import (
    TensorInfo,
    TrainingState,
    WeightSource,
    check_counters,
    kinds_of_training,
    load_torch_file,
    trained_step,
)

ZERO_FOLDER = "zero"
WEIGHT_KEY = "fp32"
STEP_KEY = "step"
PARAM = "param"
CAT_DIM = "cat_dim"
MODEL_FILE = "mp_rank_00_model_states.pt"
OPTIMIZER_FILE = "optimizer_state.pt"
MODULE = "module"


class _LossScaler:
    """Stand-in for DeepSpeed's class of that name, whose content is not needed."""


STAND_INS: list = [
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""(stand-in, class named in DeepSpeed's optimizer_state.pt)."""


class UniversalSource(WeightSource):
    """A folder with ``zero/``.

    Raises:
        ValueError: when a parameter's file is missing, or parameters are of different steps.
    """

    format = "deepspeed-universal"

    def __init__(self, path: Path):
        self.path = path
        files = sorted(path.glob("*model_states.pt"))
        if not files:
            raise ValueError(f"{path}: holds {ZERO_FOLDER}/ but no {MODEL_FILE}")
        self._modules, fragments, alias = [], [], set()
        for file in files:
            states = load_torch_file(file)
            with reading(file):
                self._modules.append(states.pop(MODULE))
                fragments.append(states.pop("frozen_param_fragments", None) or {})
                shapes = {name: torch.Size(shape) for group in states["param_shapes"] for name, shape in group.items()}
                frozen = {name: torch.Size(shape) for name, shape in (states.get("frozen_param_shapes") or {}).items()}
                alias |= set(states.get("shared_params") or {})
        folders = {p.name: p for p in (path / ZERO_FOLDER).iterdir() if p.is_dir()}
        missing = [name for name in shapes if name not in folders or not (folders[name] / f"{WEIGHT_KEY}.pt").is_file()]
        if missing:
            raise ValueError(f"{path}: {ZERO_FOLDER}/{missing[0]}/{WEIGHT_KEY}.pt is missing")
        self._folders = {name: folders[name] for name in shapes}
        # param_shapes has the shapes of one tensor-parallel rank's part; the files hold whole parameters.
        whole = {name: self._load(name, WEIGHT_KEY) for name in shapes}
        self._shapes = {
            name: tensor.shape if tensor.shape.numel() != shapes[name].numel() else shapes[name]
            for name, tensor in whole.items()
        }
        names = sorted(self._folders.get(next(iter(shapes), ""), path).glob("*.pt"))
        state_keys = tuple(p.stem for p in names if p.stem not in (WEIGHT_KEY, STEP_KEY)) if shapes else ()
        untrained = [name for name in self._modules[0] if name not in shapes and name not in alias]
        self._untrained = {name: self._join(name, frozen.get(name), fragments) for name in untrained}
        self.step = trained_step(states)
        self._state_keys = state_keys
        self.kinds = kinds_of_training(state_keys)
        optimizer = path / ZERO_FOLDER / OPTIMIZER_FILE
        if state_keys and optimizer.is_file():
            with torch.serialization.safe_globals(STAND_INS):
                settings = load_torch_file(optimizer)
            self.training_state = TrainingState(
                shapes=self._shapes,
                state_keys=state_keys,
                updates=self._updates(settings),
                model_states=states,
                optimizer=settings,
            )
            check_counters(path, states, self.training_state.updates)

    def _join(self, name: str, shape: torch.Size | None, fragments: list[dict]) -> Tensor:
        """Return an untrained tensor. DeepSpeed's converter leaves those of stage 3 sharded over ranks, the last one padded."""
        parts = [module[name] for module in self._modules]
        if shape is not None and parts[0].shape != shape and all(name in fragment for fragment in fragments):
            return torch.cat([fragment[name].flatten() for fragment in fragments])[: shape.numel()].view(shape)
        return join_parts(name, parts)

    def _updates(self, settings: dict) -> int:
        """Return the number of optimizer updates; all parameters must agree."""
        steps: dict[int, str] = {}
        for name, folder in self._folders.items():
            file = folder / f"{STEP_KEY}.pt"
            if file.is_file():
                with reading(file):
                    steps.setdefault(int(load_torch_file(file)), name)
        if len(steps) > 1:
            (first, one), (second, other), *_ = steps.items()
            raise ValueError(f"{self.path}: {one} is of update {first}, {other} of update {second}")
        if steps:
            return next(iter(steps))
        with reading(self.path / ZERO_FOLDER / OPTIMIZER_FILE):  # where DeepSpeed writes it under stage 3
            return int(settings["optimizer_state_dict"]["state"][0][STEP_KEY])

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        infos = {name: TensorInfo(shape, torch.float32) for name, shape in self._shapes.items()}
        return infos | {name: TensorInfo(t.shape, t.dtype) for name, t in self._untrained.items()}

    def _read(self, name: str, kind: str) -> Tensor:
        if name not in self._shapes:
            return self._untrained[name].clone()
        # A checkpoint with only averaged weights stores them in place of the trained ones.
        key = kind if kind in self._state_keys else WEIGHT_KEY
        tensor, shape = self._load(name, key), self._shapes[name]
        if tensor.numel() != shape.numel():
            raise ValueError(f"{self._folders[name] / key}.pt: has shape {list(tensor.shape)} instead of {list(shape)}")
        return tensor.reshape(shape).clone()

    def _load(self, name: str, key: str) -> Tensor:
        file = self._folders[name] / f"{key}.pt"
        content = load_torch_file(file)
        tensor = content.get(PARAM) if isinstance(content, dict) else content
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: holds no tensor")
        return tensor
