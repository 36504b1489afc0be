"""The data set of latents precomputed by tools/encode_latents.py.

The folder is a saved data set of Hugging Face ``datasets`` (``load_from_disk`` opens it) with an additional manifest:

    manifest.json                    source and codec, counts, statistics, size and SHA-256 of each shard; written last
    settings.json                    the part of the manifest known before the first image, written first
    data-00000-of-00313.arrow        latents of the images 0 .. shard_size - 1 of the source, and so on
    data-00000-of-00313.json         written after the shard is complete: rows, SHA-256, sums, broken images
    state.json, dataset_info.json    what load_from_disk reads

Columns: ``latent`` and, with flips, ``latent_flipped`` (the latent of the mirrored image), the bits of C x H x W bfloat16 numbers
in that order as int16, because Arrow has no bfloat16 (``torch.from_numpy(array).view(torch.bfloat16)`` reads them without a
copy); ``label`` (a class) or ``text`` (a caption); ``index``, the source row of the latent. Row i belongs to image i, or to its
replacement if that is broken, so a training run draws the same samples from latents as from images.

Shapes: C latent channels, (H, W) latent size.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from torch.utils.data import Dataset

from latte_flow.model.codecs import LatentCodec
from latte_flow.model.files import read_json
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.class_names import resolve_class_names
from latte_flow.training.data.latents.shard import open_shard
from latte_flow.training.data.prompts import StoredTexts, make_prompts
from latte_flow.training.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST_FILE = "manifest.json"
SETTINGS_FILE = "settings.json"
STATE_FILE = "state.json"
COMMAND = "tools/encode_latents.py"
ENCODE_AGAIN = f"delete it and the .json of the same name, {MANIFEST_FILE} too, and run {COMMAND} again"
"""How to fix a damaged shard."""


def shard_name(shard: int, num_shards: int) -> str:
    """Return the file name of a shard, in the naming scheme of ``datasets``."""
    return f"data-{shard:05d}-of-{num_shards:05d}.arrow"


def latent_columns(flips: bool) -> tuple[str, ...]:
    """Return the names of the latent columns."""
    return ("latent", "latent_flipped") if flips else ("latent",)


class LatentDataset(Dataset):
    """Latents with prompts; a replacement for ImageDataset.

    Attributes:
        name: for messages and logs.
        manifest: the content of manifest.json.
        prompt_rows: the row of each latent's prompt in ``prompts``.
        prompts: the distinct user messages.
        image_channels: c of the encoded images.
        class_names: class names, or None for captions.
        fingerprint: SHA-256 of the manifest, which holds the hash of every shard.

    Raises:
        UserError: when a shard is unreadable or does not match the manifest.
    """

    def __init__(
        self, folder: Path, manifest: dict, *, prompt_template: str, flips: bool, class_names: list[str] | None
    ):
        self.name = str(folder)
        self.manifest = manifest
        self.image_channels = manifest["codec"]["image_channels"]
        self.class_names = class_names
        self.fingerprint = hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
        self.shard_size = manifest["shard_size"]
        self._shards, conditions = [], []
        for entry in manifest["shards"]:
            shard, part = open_shard(
                folder / entry["file"],
                shape=tuple(manifest["latent_shape"]),
                columns=latent_columns(flips),
                rows=entry["rows"],
                num_labels=None if class_names is None else len(class_names),
            )
            self._shards.append(shard)
            conditions.append(part)
        table = pa.chunked_array(conditions)
        captions: Sequence[str]
        if class_names is not None:
            captions, self.prompt_rows = class_names, table.to_numpy()
        else:
            encoded = table.unify_dictionaries().combine_chunks()
            captions, self.prompt_rows = StoredTexts(encoded.dictionary), encoded.indices.to_numpy()
        self.prompts = make_prompts(prompt_template, captions)

    def __len__(self) -> int:
        return len(self.prompt_rows)

    def sample(self, index: int, *, flip: bool) -> dict:
        """Return {"latent": [C, H, W] bfloat16 of the image or the mirrored image, "row": row of its prompt}.

        Raises:
            UserError: when the file can no longer be read.
        """
        shard, row = divmod(index, self.shard_size)
        return {"latent": self._shards[shard].read(int(flip), row), "row": int(self.prompt_rows[index])}

    def damaged_shards(self, rank: int, world_size: int) -> list[str]:
        """Verify the SHA-256 of this rank's share of the shards and return the problems. Reads every byte."""
        problems = []
        for entry in self.manifest["shards"][rank::world_size]:
            file = Path(self.name, entry["file"])
            try:
                with file.open("rb") as stream:
                    same = hashlib.file_digest(stream, "sha256").hexdigest() == entry["sha256"]
            except OSError as error:
                problems.append(f"{file} cannot be read ({error.strerror})")
            else:
                problems += [] if same else [f"{file} has another SHA-256 than {MANIFEST_FILE} says"]
        return problems

    def check_codec(self, codec: LatentCodec) -> None:
        """Reject a codec that did not produce these latents: it would decode the sample grids wrongly.

        Raises:
            UserError: when the codec encodes differently.
        """
        made_with = self.manifest["codec"]
        if codec.fingerprint() != made_with["fingerprint"]:
            raise UserError(
                f"codec: {self.name} was encoded by another codec ({made_with['kind']}, path {made_with['path']}, scaling factor "
                f"{made_with['scaling_factor']}, fingerprint {made_with['fingerprint']}; this one has {codec.fingerprint()}); "
                "accepted: the same codec"
            )


def load_latent_dataset(config: DataConfig) -> LatentDataset:
    """Return the latents at ``config.path``.

    Raises:
        UserError: when the folder is missing, incomplete, of another resolution, or lacks the mirrored images required by
            data.horizontal_flip.
    """
    if config.path is None or not Path(config.path).is_dir():
        raise UserError(
            f"data.path: {config.path} not found; accepted with data.dataset latents: a folder of {COMMAND}"
        )
    folder = Path(config.path)
    manifest = read_manifest(folder)
    if manifest["resolution"] != config.resolution:
        raise UserError(
            f"data.resolution: {config.resolution}, but {folder} was encoded at {manifest['resolution']}; accepted: the same"
        )
    if config.horizontal_flip and not manifest["flips"]:
        raise UserError(
            f"data.horizontal_flip: true, but {folder} was encoded without mirrored images (--no_flip); accepted: false"
        )
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            raise UserError(
                f"data.path: {file} {'is missing' if size is None else f'has {size} bytes'}, {MANIFEST_FILE} says "
                f"{shard['bytes']}; accepted: {ENCODE_AGAIN}"
            )
    if int(os.environ.get("RANK", 0)) == 0:
        for warning in manifest["warnings"]:
            logger.warning("%s: %s", folder, warning)
    names = manifest["class_names"]
    if names is not None:
        names = resolve_class_names(config.class_names, names)
    elif config.class_names is not None:
        raise UserError(f"data.class_names: {folder} holds captions; accepted: null")
    template, flips = config.prompt_template, manifest["flips"]
    return LatentDataset(folder, manifest, prompt_template=template, flips=flips, class_names=names)


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a complete folder of latents.

    Raises:
        UserError: when the folder is incomplete or has the format of another version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        started = (folder / SETTINGS_FILE).is_file()
        state = (
            "is missing: encoding is incomplete; the same command resumes where it stopped" if started else "is missing"
        )
        raise UserError(f"data.path: {path} {state}; accepted with data.dataset latents: a folder of {COMMAND}")

    def check(manifest: dict) -> dict:
        if manifest.get("format") != FORMAT:
            raise UserError(f"data.path: {path} has format {manifest.get('format')}; accepted: {FORMAT}")
        if expected != state_fingerprint(path.read_bytes()):
            raise ValueError(f"its SHA-256 is not the one in {STATE_FILE}")
        _check_manifest(manifest)
        return manifest

    try:
        expected = read_json(folder / STATE_FILE, lambda state: state["_fingerprint"])
        return read_json(path, check)
    except ValueError as error:
        raise (
            error
            if isinstance(error, UserError)
            else UserError(
                f"data.path: {error}; accepted: delete {MANIFEST_FILE} and {STATE_FILE} and run {COMMAND} again, which keeps all "
                "shards"
            )
        ) from error


def state_fingerprint(manifest: bytes) -> str:
    """Return the data set fingerprint in state.json: a hash of manifest.json, and thereby of every shard."""
    return hashlib.sha256(manifest).hexdigest()[:16]


def _check_manifest(manifest: dict) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError for a manifest that LatentWriter cannot have written."""
    total, size, shape = manifest["num_images"], manifest["shard_size"], manifest["latent_shape"]
    numbers = [total, size, manifest["resolution"], manifest["codec"]["image_channels"], *shape]
    if not all(type(number) is int and 0 < number < 2**63 for number in numbers) or len(shape) != 3:
        raise ValueError(
            "num_images, shard_size, resolution, image_channels, latent_shape: not all are positive integers"
        )
    names = manifest["class_names"]
    if not isinstance(names, list | None) or not all(
        isinstance(text, str) for text in [*(names or ()), *manifest["warnings"]]
    ):
        raise TypeError("class_names, warnings: not lists of text")
    if type(manifest["flips"]) is not bool:
        raise TypeError("flips: not a boolean")
    codec = manifest["codec"]
    codec["kind"], codec["path"], codec["scaling_factor"], codec["fingerprint"]
    shards = manifest["shards"]
    if len(shards) != -(-total // size):
        raise ValueError(f"shards: {len(shards)} of {-(-total // size)}")
    for number, shard in enumerate(shards):
        rows = min(size, total - number * size)
        if shard["file"] != shard_name(number, len(shards)) or shard["rows"] != rows:
            raise ValueError(
                f"shards: number {number} does not have the name {shard_name(number, len(shards))} and {rows} rows"
            )
        shard["bytes"], shard["sha256"]
