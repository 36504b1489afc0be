"""Image data sets on disk, all read through ``datasets``: image folders, Parquet files, WebDataset tars, saved data sets."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.class_names import resolve_class_names
from latte_flow.training.data.images import BrokenImageError, ImageDataset, decode_image
from latte_flow.training.data.whole_files import STATE_FILE, MappedFiles, check_end, check_tars, damaged_file
from latte_flow.training.errors import UserError

logger = logging.getLogger(__name__)

AUTO = "auto"
TEXT_COLUMNS = ("text", "caption", "txt", "label", "cls")
SAMPLED_BYTES = 1 << 16


def load_image_source(config: DataConfig) -> ImageDataset:
    """Return the images at ``config.path`` with their captions or classes as prompts.

    Raises:
        UserError: when the path or a column is missing, of the wrong type, or holds no image; the message names the field.
    """
    if config.path is None or not Path(config.path).exists():
        raise UserError(f"data.path: {config.path} not found; accepted: {_ACCEPTED[config.dataset]}")
    table, fingerprint = _read_source(config.dataset, Path(config.path))
    if len(table) == 0:
        raise UserError(f"data.path: {config.path} holds zero images; at least one is needed")
    image_column = _image_column(table, config)
    captions, rows, class_names = _captions(table, config)
    images = _undecoded(table, image_column, config.path)
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
        prompts=[config.prompt_template.format(caption) for caption in captions],
        image_channels=3,
        class_names=class_names,
        fingerprint=fingerprint,
        captions=captions,
        describe=describe,
        max_broken=int(config.max_broken_fraction * len(table)),
    )


def detect_dataset(path: Path) -> str:
    """Return the value of data.dataset for a path.

    Raises:
        UserError: when the path does not exist.
    """
    if not path.exists():
        raise UserError(f"source: {path} not found; accepted: digits, or a folder or file of images")
    if (path / STATE_FILE).is_file() or (path / "dataset_dict.json").is_file():
        return "saved"
    for kind, suffix in (("parquet", ".parquet"), ("webdataset", ".tar")):
        if path.suffix == suffix or (path.is_dir() and next(path.glob(f"**/*{suffix}"), None)):
            return kind
    return "imagefolder"


_ACCEPTED = {
    "imagefolder": "a folder of images",
    "parquet": "a Parquet file, or a folder of them",
    "webdataset": "a tar file, or a folder of them",
    "saved": "a folder written by save_to_disk",
}


def _read_source(kind: str, path: Path):
    """Return the table of a data set and its fingerprint.

    Raises:
        UserError: when it is unreadable or incomplete; the message names the damaged file if one is found.
    """
    import datasets

    paths = _FINDERS[kind](path)
    read = _READERS.get(kind, _read_files)
    try:
        for file in paths if kind == "saved" else ():
            if file.suffix == ".arrow":
                check_end(file)
        table = read(path, kind, paths)
        if kind == "webdataset":
            check_tars(paths, Path(table.cache_files[0]["filename"]).parent)
        # Offsets of damaged columns point anywhere in memory. Of the image column, this reads only the offsets.
        table.data.validate(full=True)
        files = [file for file in paths if kind != "saved" or file.suffix == ".arrow"]
        return table, _fingerprint(path, files, read=kind != "imagefolder")
    except UserError:
        raise
    except Exception as error:  # datasets passes on any error of its readers: tarfile, json, pyarrow
        described = paths
        if kind == "imagefolder":  # images only need to exist here; undecodable ones are handled later
            missing = [file for file in paths if not file.exists()]
            described = [*missing[:1], *(file for file in paths if file.name.startswith("metadata."))]
        if found := damaged_file(described):
            file, reason = found
            raise UserError(f"data.path: {file} {reason}; accepted: an intact copy of it") from error
        raise UserError(
            f"data.path: {path} cannot be read as {kind}: {_one_line(error.__cause__ or error)}; accepted: {_ACCEPTED[kind]} "
            f"(its files are readable: the cached copy in {datasets.config.HF_DATASETS_CACHE} may be damaged and can be deleted)"
        ) from error


def _read_imagefolder(path: Path, kind: str, paths: list[Path]):
    import datasets

    # As one split: with data_dir alone, folders named train or test would be treated as splits. "**" follows no links.
    folders = {folder for file in paths for folder in file.parents if path in folder.parents}
    roots = [path, *sorted(folder for folder in folders if folder.is_symlink())]
    try:
        table = datasets.load_dataset(kind, data_files={"train": [f"{r.absolute()}/**" for r in roots]}, split="train")
    except (datasets.data_files.EmptyDatasetError, FileNotFoundError, ValueError) as error:
        if damaged_file([file for file in paths if file.name.startswith("metadata.") or not file.exists()]):
            raise
        raise UserError(f"data.path: {path} holds zero images; at least one is needed ({_one_line(error)})") from error
    if isinstance(label := table.features.get("label"), datasets.ClassLabel):
        _report_folders_without_pictures(path, paths, label.names)
    return table


def _read_files(path: Path, kind: str, paths: list[Path]):
    import datasets
    import pyarrow.parquet as pq

    if kind == "parquet" and sum(pq.read_metadata(file).num_rows for file in paths) == 0:
        raise UserError(f"data.path: {path} holds zero images; at least one is needed")
    return datasets.load_dataset(kind, data_files=[str(file.absolute()) for file in paths], split="train")


def _read_saved(path: Path, kind: str, paths: list[Path]):
    import datasets

    # datasets writes no Arrow file for an empty data set.
    if (path / "state.json").is_file() and not any(file.suffix == ".arrow" for file in paths):
        raise UserError(f"data.path: {path} holds zero images; at least one is needed")
    table = datasets.load_from_disk(str(path))
    if isinstance(table, datasets.DatasetDict):
        folders = ", ".join(str(path / split) for split in table)
        raise UserError(f"data.path: {path} holds several splits; accepted: one of {folders}")
    return table


def _files_of_folder(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(
            f"data.path: {path} is not a folder; accepted with data.dataset imagefolder: a folder of images"
        )

    # Classes are numbered by name: a folder that is left out silently would shift the labels of all that follow.
    def unreadable(error: OSError) -> None:
        if not _is_ignored(Path(error.filename), path):
            raise UserError(
                f"data.path: {error.filename} cannot be listed: {error.strerror}; accepted: readable folders"
            ) from error

    seen: dict[str, str] = {}
    files: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=unreadable, followlinks=True):
        # A link that is followed becomes a class, also one with a name that datasets ignores.
        links = [Path(folder, name) for name in folders if os.path.islink(Path(folder, name))]
        folders[:] = sorted(set(folders) - {link.name for link in links if _is_ignored(link, path)})
        real = os.path.realpath(folder)
        if real in seen:
            raise UserError(f"data.path: {folder} and {seen[real]} are the same folder; accepted: each folder once")
        seen[real] = folder
        if not names and not folders and not _is_ignored(Path(folder), path):
            logger.warning("%s is empty: it is not one of the classes", folder)
        files += [Path(folder, name) for name in names]
    return files


def _is_ignored(folder: Path, root: Path) -> bool:
    """Return whether datasets ignores a folder because of its name or one above it, or the file system made it."""
    return any(part.startswith((".", "__")) or part == "lost+found" for part in folder.relative_to(root).parts)


def _report_folders_without_pictures(root: Path, files: list[Path], class_names: list[str]) -> None:
    """Log folders that look like classes but hold only other files, such as an archive that was not extracted."""
    folders = {file.parent for file in files}
    inner = {parent for folder in folders for parent in folder.parents}
    for folder in sorted(folders - inner - {root}):
        if folder.name not in class_names and not _is_ignored(folder, root):
            logger.warning("%s holds no picture: it is not one of the classes", folder)


def _files_like(pattern: str, kind: str, path: Path) -> list[Path]:
    files = sorted(path.glob(f"**/{pattern}")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"data.path: {path} holds no {pattern} file; accepted with data.dataset {kind}: {_ACCEPTED[kind]}"
        )
    return files


def _files_of_saved(path: Path) -> list[Path]:
    described = [path / STATE_FILE, path / "dataset_info.json"]
    try:
        names = [entry["filename"] for entry in json.loads(described[0].read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):  # datasets raises the same error later, where it is reported
        names = [file.name for file in sorted(path.glob("*.arrow"))]
    return described + [path / name for name in names]


_FINDERS: dict[str, Callable[[Path], list[Path]]] = {
    "imagefolder": _files_of_folder,
    "parquet": functools.partial(_files_like, "*.parquet", "parquet"),
    "webdataset": functools.partial(_files_like, "*.tar", "webdataset"),
    "saved": _files_of_saved,
}


_READERS: dict[str, Callable] = {"imagefolder": _read_imagefolder, "saved": _read_saved}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _fingerprint(root: Path, files: list[Path], *, read: bool) -> str:
    """Return the SHA-256 of the files' relative names and sizes and, with ``read``, of the start and end of each file.

    Excludes modification times, which copying changes, and full contents: 150 GB would be read before the first step.
    """
    digest = hashlib.sha256()
    base = root if root.is_dir() else root.parent
    for name, file in sorted((file.relative_to(base).as_posix(), file) for file in files):
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        if read:
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLED_BYTES))
                stream.seek(max(size - SAMPLED_BYTES, 0))  # a Parquet file's footer describes all its columns
                digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()


MAX_CLASSES = 100_000
"""Limit for a column of class numbers without names: a prompt is made for every number up to the largest."""


def _image_column(table, config: DataConfig) -> str:
    import datasets

    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    wanted, columns = config.image_column, ", ".join(table.column_names)
    if wanted == AUTO:
        if len(found) != 1 and "image" not in table.column_names:
            raise UserError(
                f"data.image_column: {AUTO}, but {config.path} has {len(found)} image columns; accepted: one of {columns}"
            )
        return "image" if "image" in table.column_names else found[0]
    if wanted not in table.column_names:
        raise UserError(f"data.image_column: {wanted!r} is not in {config.path}; accepted: {columns}")
    return wanted


def _undecoded(table, image_column: str, path: str):
    """Return the image column undecoded, as bytes: decoding happens later, where a broken image can be told from a bug.

    Raises:
        UserError: when the column does not hold images.
    """
    import datasets
    import pyarrow as pa

    is_image = isinstance(table.features[image_column], datasets.Image)
    try:
        images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        if not is_image:  # the type allows bytes or paths; the first value is checked
            decode_image(images[0][image_column], resolution=1)
    except (ValueError, TypeError, pa.ArrowException, BrokenImageError) as error:
        raise UserError(
            f"data.image_column: {image_column!r} of {path} does not hold images ({_one_line(error)}); accepted: a column of them"
        ) from error
    return images


def _captions(table, config: DataConfig) -> tuple[list[str], list[int], list[str] | None]:
    """Return the distinct captions or class names, the row of each image's, and the names again if they are classes."""
    import datasets

    column, columns = config.text_column, ", ".join(table.column_names)
    if column == AUTO:
        column = next((name for name in TEXT_COLUMNS if name in table.column_names), "")
        if not column:
            raise UserError(
                f"data.text_column: {AUTO}, but none of {', '.join(TEXT_COLUMNS)} is in {config.path}; accepted: one of "
                f"{columns}, with captions or classes (an image folder needs at least two class folders, or a metadata.jsonl)"
            )
    if column not in table.column_names:
        raise UserError(f"data.text_column: {column!r} is not in {config.path}; accepted: {columns}")
    feature = table.features[column]
    values = table.select_columns([column])[:][column]
    accepted = (int,) if isinstance(feature, datasets.ClassLabel) else (str, int)
    for row, value in enumerate(values):
        if not isinstance(value, accepted) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise UserError(
                f"data.text_column: {column} of row {row} of {config.path} is {value!r}; accepted: a caption or a class in every "
                "row"
            )
    if isinstance(values[0], int):
        if isinstance(feature, datasets.ClassLabel):
            own = list(feature.names)
        else:
            if max(values) >= MAX_CLASSES:
                row = values.index(max(values))
                raise UserError(
                    f"data.text_column: {column} of row {row} of {config.path} is class {max(values)}; accepted: less than "
                    f"{MAX_CLASSES:,}, or a column with the names of its classes"
                )
            own = [str(number) for number in range(max(values) + 1)]
            if config.class_names is None:
                logger.warning(
                    "%s has classes without names: prompts will use their numbers; see data.class_names", column
                )
        names = resolve_class_names(config.class_names, own)
        return names, list(values), names
    if config.class_names is not None:
        raise UserError(
            f"data.class_names: {column} of {config.path} holds captions; accepted: null, or another text_column"
        )
    captions = list(dict.fromkeys(values))
    row_of = {caption: row for row, caption in enumerate(captions)}
    return captions, [row_of[value] for value in values], None
