"""Detects the format of a path and returns its reader."""

from pathlib import Path

from latte_flow.training.checkpoint.formats import safetensors_files, torch_files
from latte_flow.training.checkpoint.formats.safetensors_files import SafetensorsSource
from latte_flow.training.checkpoint.formats.source import WeightSource, check_export_sizes, read_export_record
from latte_flow.training.checkpoint.formats.torch_dcp import METADATA_FILE, DistributedCheckpointSource
from latte_flow.training.checkpoint.formats.torch_files import (
    SUFFIXES,
    MegatronRanksSource,
    TorchFileSource,
    has_megatron_ranks,
)
from latte_flow.training.checkpoint.formats.universal import ZERO_FOLDER, UniversalSource

ACCEPTED = (
    "accepted: a training output_dir or one step's folder of it, DeepSpeed's ZeRO shards, a DeepSpeed universal checkpoint, "
    "model.safetensors, model.safetensors.index.json, a .pt, .pth or .bin file, a torch DCP folder, Megatron's mp_rank_XX "
    "folders, or Megatron's dist_checkpointing"
)
TORCH_INDEX = torch_files.WEIGHTS_FILE + ".index.json"


def open_weights(path: Path) -> WeightSource:
    """Return a reader for the weights at a path.

    Raises:
        ValueError: when it is missing, damaged, in no known format, or in several; the message names the file.
    """
    if not path.exists():
        raise ValueError(f"{path}: not found; {ACCEPTED}")
    found = _recognise(path)
    if not found:
        raise ValueError(f"{path}: holds no weights in a known format; {ACCEPTED}")
    if len(found) > 1:
        names = ", ".join(reader.__name__.removesuffix("Source") for reader, _ in found)
        raise ValueError(f"{path}: holds weights in several formats ({names}); accepted: the path of one of them")
    folder = path if path.is_dir() else path.parent
    record = read_export_record(folder)
    if record is not None:
        check_export_sizes(folder, record)
    reader, file = found[0]
    source = reader(file)
    if record is not None and source.path.is_relative_to(folder):
        source.step = record["step"] if source.step is None else source.step
        if record["weights"] is not None:
            source.kinds = (record["weights"],)
    return source


def _recognise(path: Path) -> list[tuple[type, Path]]:
    """Return (reader, path to open) for every format found at a path."""
    if path.is_file():
        if path.name.endswith(".safetensors.index.json") or path.suffix == ".safetensors":
            return [(SafetensorsSource, path)]
        if path.name.endswith(".bin.index.json") or path.suffix in SUFFIXES:
            return [(TorchFileSource, path)]
        return []
    if not path.is_dir():
        return []
    found: list[tuple[type, Path]] = []
    if (path / ZERO_FOLDER).is_dir():
        return [(UniversalSource, path)]
    if (path / METADATA_FILE).is_file():
        found.append((DistributedCheckpointSource, path))
    if has_megatron_ranks(path):
        found.append((MegatronRanksSource, path))
    for reader, index, single in (
        (SafetensorsSource, safetensors_files.INDEX_FILE, safetensors_files.WEIGHTS_FILE),
        (TorchFileSource, TORCH_INDEX, torch_files.WEIGHTS_FILE),
    ):
        name = next((name for name in (index, single) if (path / name).is_file()), None)
        if name is not None:
            found.append((reader, path / name))
    return found or _recognise_any_name(path)


def _recognise_any_name(folder: Path) -> list[tuple[type, Path]]:
    """Return the only shard index or the only weight file in a folder, whatever its name."""
    for reader, patterns in (
        (SafetensorsSource, ("*.safetensors.index.json", "*.safetensors")),
        (TorchFileSource, ("*.bin.index.json", *(f"*{suffix}" for suffix in SUFFIXES))),
    ):
        for pattern in patterns:
            files = list(folder.glob(pattern))
            if len(files) == 1:
                return [(reader, files[0])]
    return []
