"""Image data sets on disk, all read through ``datasets``: image folders, Parquet files, WebDataset tars, saved data sets."""

import hashlib
import logging
import os
from pathlib import Path

from training.config import DataConfig
from training.data.class_names import resolve_class_names
from training.data.images import BrokenImageError, ImageDataset, decode_image
from training.errors import UserError

logger = logging.getLogger(__name__)

AUTO = "auto"
TEXT_COLUMNS = ("text", "caption", "txt", "label", "cls")
SAMPLED_BYTES = 1 << 16


def load_image_source(config: DataConfig) -> ImageDataset:
    """Return the images at ``config.path`` with their captions or classes as prompts.

    Raises:
        UserError: when the path or a column is missing, of another kind, or holds no image; the message names the field.
    """
    if config.path is None or not Path(config.path).exists():
        raise UserError(f"data.path: {config.path} not found; accepted: {_ACCEPTED[config.dataset]}")
    table, fingerprint = _READERS[config.dataset](Path(config.path))
    if len(table) == 0:
        raise UserError(f"data.path: {config.path} holds zero images; at least one is needed")
    image_column = _image_column(table, config)
    captions, rows, class_names = _captions(table, config)
    images = _undecoded(table, image_column, config.path)

    def describe(index: int) -> str:
        value = images[index][image_column]
        path = value["path"] if value else None
        return f"{path} (row {index} of {config.path})" if path else f"row {index} of {config.path}"

    return ImageDataset(
        name=str(config.path),
        length=len(table),
        load=lambda index: decode_image(images[index][image_column], config.resolution),
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
    """Return which value of data.dataset reads a path.

    Raises:
        UserError: when the path does not exist.
    """
    if not path.exists():
        raise UserError(f"source: {path} not found; accepted: digits, or a folder or file of images")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return "saved"
    for kind, suffix in (("parquet", ".parquet"), ("webdataset", ".tar")):
        if path.suffix == suffix or (path.is_dir() and next(path.glob(f"**/*{suffix}"), None)):
            return kind
    return "imagefolder"


_ACCEPTED = {
    "imagefolder": "a folder of images",
    "parquet": "a Parquet file, or a folder of them",
    "webdataset": "a tar file, or a folder of them",
    "saved": "a folder of save_to_disk",
}


def _read_imagefolder(path: Path):
    import datasets  # costs a second to import; the digits preset does without

    if not path.is_dir():
        raise UserError(f"data.path: {path} is no folder; accepted with data.dataset imagefolder: a folder of images")
    # As one split: with data_dir alone, folders named train or test would be taken for splits.
    try:
        table = datasets.load_dataset("imagefolder", data_files={"train": f"{path.absolute()}/**"}, split="train")
    except (datasets.data_files.EmptyDatasetError, FileNotFoundError, ValueError) as error:
        raise UserError(f"data.path: {path} holds zero images; at least one is needed ({_one_line(error)})") from error
    files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    return table, _fingerprint(path, files, read=False)


def _read_parquet(path: Path):
    import pyarrow.parquet as pq

    num_images = 0
    for file in _files(path, "parquet", "*.parquet"):
        try:
            num_images += pq.read_metadata(file).num_rows
        except (OSError, ValueError) as error:
            raise UserError(f"data.path: {file} is no Parquet file, or damaged: {_one_line(error)}") from error
    if num_images == 0:
        raise UserError(f"data.path: {path} holds zero images; at least one is needed")
    return _read_files(path, "parquet", "*.parquet")


def _read_webdataset(path: Path):
    return _read_files(path, "webdataset", "*.tar")


def _files(path: Path, kind: str, pattern: str) -> list[Path]:
    files = sorted(path.glob(f"**/{pattern}")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"data.path: {path} holds no {pattern} file; accepted with data.dataset {kind}: {_ACCEPTED[kind]}"
        )
    return files


def _read_files(path: Path, kind: str, pattern: str):
    import datasets

    files = _files(path, kind, pattern)
    try:
        table = datasets.load_dataset(kind, data_files=[str(file.absolute()) for file in files], split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"data.path: {path} cannot be read as {kind}: {_one_line(cause)}; accepted: {_ACCEPTED[kind]}"
        ) from error
    return table, _fingerprint(path, files, read=True)


def _read_saved(path: Path):
    import datasets

    if (path / "state.json").is_file() and not any(path.glob("*.arrow")):  # datasets writes no file for no rows
        raise UserError(f"data.path: {path} holds zero images; at least one is needed")
    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.path: {path} cannot be read: {_one_line(error)}; accepted with data.dataset saved: a folder of save_to_disk"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        folders = ", ".join(str(path / split) for split in table)
        raise UserError(f"data.path: {path} holds several splits; accepted: one of {folders}")
    return table, _fingerprint(path, sorted(path.glob("*.arrow")), read=True)


_READERS = {
    "imagefolder": _read_imagefolder,
    "parquet": _read_parquet,
    "webdataset": _read_webdataset,
    "saved": _read_saved,
}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fingerprint(root: Path, files: list[Path], *, read: bool) -> str:
    """Return the SHA-256 over the files' relative names and sizes, and over both ends of each when ``read``.

    Not over times, which copying changes, nor over all contents: 150 GB would be read before the first step.
    """
    digest = hashlib.sha256()
    base = root if root.is_dir() else root.parent
    for name, file in sorted((file.relative_to(base).as_posix(), file) for file in files):
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        if read:
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLED_BYTES))
                stream.seek(max(size - SAMPLED_BYTES, 0))  # a Parquet file's footer tells of all its columns
                digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()


def _image_column(table, config: DataConfig) -> str:
    import datasets

    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    wanted, columns = config.image_column, ", ".join(table.column_names)
    if wanted == AUTO:
        if len(found) != 1 and "image" not in table.column_names:
            raise UserError(
                f"data.image_column: {AUTO}, but {config.path} has {len(found)} columns of images; accepted: one of {columns}"
            )
        return "image" if "image" in table.column_names else found[0]
    if wanted not in table.column_names:
        raise UserError(f"data.image_column: {wanted!r} is not in {config.path}; accepted: {columns}")
    return wanted


def _undecoded(table, image_column: str, path: str):
    """Return the column of images as a table of their bytes: they are decoded where an error can be told from a bug.

    Raises:
        UserError: when the column holds something else.
    """
    import datasets
    import pyarrow as pa

    is_image = isinstance(table.features[image_column], datasets.Image)
    try:
        images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        if not is_image:  # bytes or paths, by their type; the first one tells
            decode_image(images[0][image_column], resolution=1)
    except (ValueError, TypeError, pa.ArrowException, BrokenImageError) as error:
        raise UserError(
            f"data.image_column: {image_column!r} of {path} does not hold images ({_one_line(error)}); accepted: a column of them"
        ) from error
    return images


def _captions(table, config: DataConfig) -> tuple[list[str], list[int], list[str] | None]:
    """Return the distinct captions or class names, which one each image has, and the names again if they are classes."""
    import datasets

    column, columns = config.text_column, ", ".join(table.column_names)
    if column == AUTO:
        column = next((name for name in TEXT_COLUMNS if name in table.column_names), None)
        if column is None:
            raise UserError(
                f"data.text_column: {AUTO}, but none of {', '.join(TEXT_COLUMNS)} is in {config.path}; accepted: one of "
                f"{columns}, with captions or classes (an image folder needs a folder a class, at least two, or a metadata.jsonl)"
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
            own = [str(number) for number in range(max(values) + 1)]
            if config.class_names is None:
                logger.warning(
                    "%s has classes without names: prompts are made of their numbers; see data.class_names", column
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
