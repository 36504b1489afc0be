"""torch's distributed checkpoints (DCP), and Megatron's dist_checkpointing, which is DCP with common.pt and metadata.json.

DCP's .metadata is a pickle. It is read with an unpickler that allows only DCP's own classes.
"""

import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from latte_flow.model.files import read_json, reading
from latte_flow.training.checkpoint.formats.source import TensorInfo, WeightSource, load_torch_file

METADATA_FILE = ".metadata"
MEGATRON_FILE = "metadata.json"
COMMON_FILE = "common.pt"
MEGATRON_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan", "WriteItem", "WriteItemType", "BytesIOWriteData", "TensorWriteData",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "device",
    },
    "collections": {"OrderedDict"},
}  # fmt: skip
"""Module -> names allowed in .metadata; calling them has no side effects."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if module == "pathlib":  # the path it was written to, which is not needed
            return PurePosixPath
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed in {METADATA_FILE}")
        return super().find_class(module, name)


def _read_metadata(path: Path) -> Metadata:
    with reading(path), path.open("rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"{path}: names the file {info.relative_path!r}; accepted: a file in the same folder")
    return metadata


class _OneTensorReader(FileSystemReader):
    """torch's reader restricted to one tensor's metadata: it would otherwise unpickle and scan all of .metadata per tensor."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self._metadata


class DistributedCheckpointSource(WeightSource):
    """The tensors of a DCP folder, assembled from the chunks they were written in. Other objects are ignored.

    Args:
        path: a folder with a .metadata file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.format = "dcp"
        metadata = _read_metadata(path / METADATA_FILE)
        self._entries = metadata.state_dict_metadata
        self._places: dict[str, dict] = {}
        for index, place in metadata.storage_data.items():
            self._places.setdefault(index.fqn, {})[index] = place
        with reading(path / METADATA_FILE):
            self._tensors = {
                name: TensorInfo(torch.Size(entry.size), entry.properties.dtype)
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            files = {info.relative_path for info in metadata.storage_data.values()}
        for file in sorted(files):
            if not (path / file).is_file():
                raise ValueError(f"{path / file}: is missing, but {METADATA_FILE} names it")
        parts = {name: (path / name).is_file() for name in (MEGATRON_FILE, COMMON_FILE)}
        if any(parts.values()):
            for name, there in parts.items():
                if not there:
                    raise ValueError(f"{path / name}: is missing; Megatron's dist_checkpointing has both, DCP neither")
            self.format = "megatron-dist"
            self._read_common()

    def _read_common(self) -> None:
        backend = read_json(self.path / MEGATRON_FILE, lambda content: content["sharded_backend"])
        if backend != MEGATRON_CONFIG["sharded_backend"]:
            raise ValueError(f"{self.path / MEGATRON_FILE}: sharded_backend {backend!r}; accepted: torch_dist")
        common = load_torch_file(self.path / COMMON_FILE)
        iteration = common.get("iteration") if isinstance(common, dict) else None
        self.step = iteration if isinstance(iteration, int) else None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def _read(self, name: str, kind: str) -> Tensor:
        info = self._tensors[name]
        state = {name: torch.empty(info.shape, dtype=info.dtype)}
        metadata = Metadata(state_dict_metadata={name: self._entries[name]}, storage_data=self._places[name])
        with reading(self.path), quiet_dcp():
            try:
                dcp.load(state, storage_reader=_OneTensorReader(self.path, metadata), no_dist=True)
            except dcp.api.CheckpointException as error:  # wraps the error and its traceback, per rank
                cause = next(iter(error.failures.values()))[0]
                raise ValueError(f"{self.path}: {name}: {type(cause).__name__}: {cause}") from error
        return state[name]


@contextmanager
def quiet_dcp() -> Iterator[None]:
    """Suppress DCP's warning that there is only one process, which is intended."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.INFO)
        try:
            yield
        finally:
            logging.disable(disabled)
