"""Images with captions or classes in an Arrow table, which ``datasets`` reads from any of its formats."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.images import BrokenImageError, ImageDataset, decode_image
from latte_flow.training.data.prompts import make_prompts
from latte_flow.training.data.sources.columns import find_image_column, one_line, read_captions, undecoded_images
from latte_flow.training.data.whole_files import MappedFiles, damaged_file
from latte_flow.training.errors import UserError

SAMPLED_BYTES = 1 << 16
VALIDATED_FOLDER = "latte_flow_validated"
"""Folder in the cache of ``datasets``: an empty file for each table that was validated."""


class ArrowSource(ABC):
    """A kind of data set that ``datasets`` reads into an Arrow table; ``load`` makes a training data set of it.

    Attributes:
        name: the value of data.dataset.
        accepted: what data.path may be, for messages.
    """

    name: str
    accepted: str

    def exists(self, path: str) -> bool:
        """Return whether there is anything at data.path."""
        return Path(path).exists()

    @abstractmethod
    def find_files(self, path: Path) -> list[Path]:
        """Return the files of the data set.

        Raises:
            UserError: when the path holds none.
        """

    @abstractmethod
    def read(self, config: DataConfig, path: Path, files: list[Path]) -> tuple[Any, str]:
        """Return the table (a ``datasets.Dataset``) and the fingerprint of the data.

        Raises:
            Exception: of any type, when a file is damaged.
        """

    def suspects(self, files: list[Path]) -> list[Path]:
        """Return the files that may have caused an error of ``read``."""
        return files

    def load(self, config: DataConfig) -> ImageDataset:
        """Return the images at ``config.path`` with their captions or classes as prompts.

        Raises:
            UserError: when the path or a column is missing, of the wrong type, or holds no image; the message names the field.
        """
        if config.path is None or not self.exists(config.path):
            raise UserError(f"data.path: {config.path} not found; accepted: {self.accepted}")
        table, digest = self._read_whole(config, Path(config.path))
        if len(table) == 0:
            raise no_images(config.path)
        return _make_dataset(table, digest, config)

    def _read_whole(self, config: DataConfig, path: Path) -> tuple[Any, str]:
        """Return the table and the fingerprint of intact data.

        Raises:
            UserError: when they are unreadable or incomplete; the message names the damaged file if one is found.
        """
        import datasets

        files = self.find_files(path)
        try:
            table, digest = self.read(config, path, files)
            _validate_once(table, digest, Path(datasets.config.HF_DATASETS_CACHE) / VALIDATED_FOLDER)
        except UserError:
            raise
        except Exception as error:  # datasets passes on any error of its readers: tarfile, json, pyarrow
            if found := damaged_file(self.suspects(files)):
                file, reason = found
                raise UserError(f"data.path: {file} {reason}; accepted: an intact copy of it") from error
            raise UserError(
                f"data.path: {path} cannot be read as {self.name}: {one_line(error.__cause__ or error)}; accepted: "
                f"{self.accepted} (its files are readable: the cached copy in {datasets.config.HF_DATASETS_CACHE} may be "
                "damaged and can be deleted)"
            ) from error
        return table, digest


def _make_dataset(table: Any, digest: str, config: DataConfig) -> ImageDataset:
    """Return the training data set of a table."""
    image_column = find_image_column(table, config)
    captions, rows, class_names = read_captions(table, config)
    images = undecoded_images(table, image_column, config)
    files = [Path(entry["filename"]) for entry in images.cache_files]
    parts = [row_of_tables[0].num_rows for row_of_tables in getattr(images.data, "blocks", [[images.data]])]
    mapped = MappedFiles(files, parts if len(parts) == len(files) else None)

    def describe(index: int) -> str:
        value = images[index][image_column]
        path = value["path"] if value else None
        return f"{path} (row {index} of {config.path})" if path else f"row {index} of {config.path}"

    def load(index: int) -> Tensor:
        if rows[index] >= len(captions):
            raise BrokenImageError(f"class {rows[index]}; accepted: 0 to {len(captions) - 1}")
        mapped.check(index)
        return decode_image(images[index][image_column], config.resolution)

    return ImageDataset(
        name=str(config.path),
        length=len(table),
        load=load,
        prompt_rows=rows,
        prompts=make_prompts(config.prompt_template, captions),
        image_channels=3,
        class_names=class_names,
        fingerprint=digest,
        captions=captions,
        describe=describe,
        max_broken=int(config.max_broken_fraction * len(table)),
    )


def _validate_once(table: Any, digest: str, folder: Path) -> None:
    """Check that a table's columns are intact: damaged offsets point anywhere in memory. Reads every caption.

    An empty file in ``folder`` records it for the table's files as they are. A file of another size or modification time is
    checked again; one rank checks, the others wait for it. Where nothing can be recorded, every start checks.

    Raises:
        pyarrow.ArrowInvalid: when a column is damaged.
    """
    state = hashlib.sha256(digest.encode())
    for file in (Path(entry["filename"]).absolute() for entry in table.cache_files):
        found = file.stat()
        state.update(f"\0{file}\0{found.st_size}\0{found.st_mtime_ns}".encode())
    mark = folder / state.hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if mark.exists():
                return
            table.data.validate(full=True)
            mark.touch()
    except (OSError, NotImplementedError):  # filelock's, on a file system without locks; or a read-only cache
        table.data.validate(full=True)


def fingerprint(root: Path, files: Sequence[Path], *, ends: bool = True) -> str:
    """Return the SHA-256 of the files' relative names and sizes and, with ``ends``, of the start and end of each file.

    Excludes modification times, which copying changes, and full contents: 150 GB would be read before the first step.
    """
    digest = hashlib.sha256()
    base = root if root.is_dir() else root.parent
    for name, file in sorted((file.relative_to(base).as_posix(), file) for file in files):
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        if ends:
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLED_BYTES))
                stream.seek(max(size - SAMPLED_BYTES, 0))  # a Parquet file's footer describes all its columns
                digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()


def no_images(path: str | Path) -> UserError:
    """Return the error for an empty data set."""
    return UserError(f"data.path: {path} holds zero images; at least one is needed")
