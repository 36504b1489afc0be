"""Files written by torch.save: a state dict, its shards with an index, and Megatron's tensor-parallel ranks (mp_rank_XX)."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from latte_flow.model.files import read_index
from latte_flow.model.tensor_split import join_parts, whole_shape
from latte_flow.training.checkpoint.formats.safetensors_files import NUMBER
from latte_flow.training.checkpoint.formats.source import TensorInfo, WeightSource, load_torch_file

WEIGHTS_FILE = "pytorch_model.bin"
"""File name used by transformers."""
SUFFIXES = (".pt", ".pth", ".bin")
WRAPPERS = ("model", "module", "state_dict")
"""Keys under which a file may hold its state dict."""
DEEPSPEED_SUFFIXES = ("_model_states.pt", "_optim_states.pt")
RANK_FILE = "model_optim_rng.pt"
RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})")
ITERATION_FOLDER = re.compile(r"iter_(\d{7,})|release")
ITERATION_FILE = "latest_checkpointed_iteration.txt"


class TorchFileSource(WeightSource):
    """A state dict in one file, or in the shards listed in an index.

    Args:
        path: a .pt, .pth or .bin file, or a .bin.index.json.
    """

    format = "pt"

    def __init__(self, path: Path):
        self.path = path
        self._state: dict[str, Tensor] = {}
        files = [path]
        if path.suffix == ".json":
            files = sorted({path.parent / name for name in read_index(path).values()})
        steps = set()
        for file in files:
            if file.name.endswith(DEEPSPEED_SUFFIXES):
                raise ValueError(f"{file}: is part of a DeepSpeed checkpoint; accepted: its folder, {file.parent}")
            state, step = _unwrap(file, load_torch_file(file))
            if twice := self._state.keys() & state.keys():
                raise ValueError(f"{file}: holds {min(twice)}, which another shard also holds")
            self._state |= state
            steps.add(step)
        if len(steps) > 1:
            raise ValueError(f"{path}: its shards are of different steps: {sorted(map(str, steps))}")
        self.step = steps.pop() if steps else None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in self._state.items()}

    def _read(self, name: str, kind: str) -> Tensor:
        return self._state[name].clone()


def _unwrap(file: Path, content) -> tuple[dict[str, Tensor], int | None]:
    """Return the state dict in a file's content, and the step if recorded."""
    step = None
    if isinstance(content, dict):
        step = next((content[key] for key in ("step", "iteration") if isinstance(content.get(key), int)), None)
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file}: holds a {type(content).__name__}; accepted: a state dict, name -> tensor")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file}: {name!r} is a {type(value).__name__}; accepted: a state dict, name -> tensor")
    return dict(content), step


class MegatronRanksSource(WeightSource):
    """The shards of Megatron's tensor-parallel ranks: ``mp_rank_XX/model_optim_rng.pt`` in a folder.

    Args:
        path: the folder; or one with iter_XXXXXXX folders, from which latest_checkpointed_iteration.txt selects one.

    Raises:
        ValueError: when a rank is missing, or ranks are of different steps.
    """

    format = "megatron-tp"

    def __init__(self, path: Path):
        self.path = path = find_iteration(path)
        ranks = {int(m[1]): p for p in path.iterdir() if (m := RANK_FOLDER.fullmatch(p.name))}
        if not ranks:
            raise ValueError(f"{path}: holds no mp_rank_XX folder")
        missing = [rank for rank in range(max(ranks)) if rank not in ranks]
        if missing:
            raise ValueError(f"{path}: holds the parts of ranks {sorted(ranks)}; mp_rank_{missing[0]:02d} is missing")
        self.world_size = len(ranks)
        self._states, steps, sizes = [], set(), set()
        for rank in sorted(ranks):
            file = ranks[rank] / RANK_FILE
            content = load_torch_file(file)
            state, step = _unwrap(file, content)
            self._states.append(state)
            steps.add(step)
            sizes.add(content.get("tensor_model_parallel_size", len(ranks)))
        if sizes != {len(ranks)}:
            raise ValueError(f"{path}: holds {len(ranks)} ranks' parts, but they were written by {max(sizes)} ranks")
        if len(steps) > 1:
            raise ValueError(f"{path}: the ranks' parts are of different steps: {sorted(map(str, steps))}")
        for rank, state in enumerate(self._states):
            first = self._states[0]
            if other := state.keys() ^ first.keys():
                raise ValueError(f"{path}: {min(other)} is in the part of only one of the ranks 0 and {rank}")
            for name, part in state.items():
                if (part.shape, part.dtype) != (first[name].shape, first[name].dtype):
                    raise ValueError(
                        f"{path}: {name} is {part.dtype} {list(part.shape)} in the part of rank {rank}, "
                        f"{first[name].dtype} {list(first[name].shape)} in that of rank 0"
                    )
        self.step = steps.pop()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(whole_shape(name, part.shape, self.world_size), part.dtype)
            for name, part in self._states[0].items()
        }

    def _read(self, name: str, kind: str) -> Tensor:
        return join_parts(name, [state[name] for state in self._states]).clone()


def find_iteration(path: Path) -> Path:
    """Return the folder of Megatron's newest iteration, or the path itself if it is one."""
    if any(RANK_FOLDER.fullmatch(p.name) for p in path.iterdir()):
        return path
    note = path / ITERATION_FILE
    if note.is_file():
        text = note.read_text(encoding="utf-8", errors="replace").strip()
        name = f"iter_{int(text):07d}" if NUMBER.fullmatch(text) else text
        if ITERATION_FOLDER.fullmatch(name) and (path / name).is_dir():
            return path / name
        raise ValueError(f"{note}: names {text!r}, but {path} has no such iteration")
    raise ValueError(f"{path}: holds no mp_rank_XX folder and no {ITERATION_FILE}")


def has_megatron_ranks(path: Path) -> bool:
    """Return whether a folder holds Megatron's tensor-parallel ranks."""
    return (path / ITERATION_FILE).is_file() or any(
        RANK_FOLDER.fullmatch(p.name) and (p / RANK_FILE).is_file() for p in path.iterdir()
    )
