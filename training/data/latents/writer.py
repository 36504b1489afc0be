"""Writes a folder of latents (training/data/latents/dataset.py); a kill at any point loses at most the current shard.

The content of each shard depends only on the order of the images, and a shard is one file that is written atomically: the result
does not depend on the number of ranks, on which rank writes which shard, or on interruptions.

Shapes: n rows of a shard, C latent channels, (H, W) latent size.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latte_flow.model.files import read_json
from latte_flow.training.data.latents.dataset import (
    COMMAND,
    MANIFEST_FILE,
    SETTINGS_FILE,
    STATE_FILE,
    latent_columns,
    shard_name,
    state_fingerprint,
)
from latte_flow.training.durable import PARTIAL, write_durably
from latte_flow.training.errors import UserError

STATISTICS_ROWS = 256
UNIT_STD = (0.5, 2.0)
SHARD_KEYS = frozenset({"file", "bytes", "sha256", "rows", "broken", "statistics"})
"""Keys in the JSON file of a shard."""


class LatentWriter:
    """The shards of one folder.

    Args:
        folder: created when missing.
        settings: all that determines the result: source, codec, resolution, latent_shape, flips, shard_size, num_images,
            class_names.

    Raises:
        UserError: when the folder holds other files, or latents made with other settings.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder = folder
        path = folder / SETTINGS_FILE
        foreign = folder.exists() and (
            not folder.is_dir() or any(PARTIAL not in file.name for file in folder.iterdir())
        )
        if foreign and not path.is_file():  # in this order: another rank may be writing it
            raise UserError(
                f"output: {folder} exists and is not a folder of {COMMAND}; accepted: a new or empty folder"
            )
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, _json(settings))
        # Those of the first start: the paths of source and codec may have changed since.
        self.settings = _read_json(path, "another folder")
        _refuse_other_settings(folder, self.settings, settings)
        self.num_shards = -(-settings["num_images"] // settings["shard_size"])

    def rows(self, shard: int) -> range:
        """Return the source images in a shard."""
        size = self.settings["shard_size"]
        return range(shard * size, min((shard + 1) * size, self.settings["num_images"]))

    def path(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self.folder / shard_name(shard, self.num_shards)

    def is_complete(self, shard: int) -> bool:
        """Return whether a shard is complete: its JSON file is written after it."""
        return self.path(shard).with_suffix(".json").is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the whole folder is complete."""
        return (self.folder / MANIFEST_FILE).is_file()

    def features(self):
        """Return the columns as ``datasets.Features``."""
        import datasets

        length = int(np.prod(self.settings["latent_shape"]))
        columns = {
            name: datasets.List(datasets.Value("int16"), length=length)
            for name in latent_columns(self.settings["flips"])
        }
        names = self.settings["class_names"]
        if names is None:
            columns["text"] = datasets.Value("string")
        else:  # ImageNet has two classes named crane; datasets refuses that
            counts = Counter(names)
            distinct = [name if counts[name] == 1 else f"{name} ({row})" for row, name in enumerate(names)]
            columns["label"] = datasets.ClassLabel(names=distinct)
        return datasets.Features(columns | {"index": datasets.Value("int64")})

    def write_shard(
        self, shard: int, latents: dict[str, Tensor], conditions: list, sources: list[int], reasons: dict[int, str]
    ) -> None:
        """Write a complete shard.

        Args:
            shard: index of the shard.
            latents: [n, C, H, W] bfloat16 on the CPU for each latent column.
            conditions: the class index or caption of each row.
            sources: the source image of each row.
            reasons: image -> why it could not be decoded, for the broken images of this shard.

        Raises:
            UserError: when a latent is not finite.
        """
        schema = self.features().arrow_schema
        arrays = []
        for name, value in latents.items():
            bits = value.contiguous().view(torch.int16).numpy()
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(bits.reshape(-1)), bits[0].size))
            assert schema.field(name).type == arrays[-1].type
        arrays += [pa.array(conditions, schema.types[-2]), pa.array(sources, pa.int64())]
        statistics = _sums(list(latents.values()))
        if not np.isfinite(statistics["squares"]).all():
            raise UserError(
                f"codec: its latents of images {self.rows(shard)[0]} to {self.rows(shard)[-1]} hold infinite values or NaN; "
                "accepted: finite latents (--precision fp32 helps if bfloat16 overflows)"
            )
        sink = pa.BufferOutputStream()
        # One record batch per shard: row i of the data set is row i mod shard_size of one array.
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        content = sink.getvalue()
        write_durably(self.path(shard), content)
        manifest = {
            "file": self.path(shard).name,
            "bytes": content.size,
            "sha256": hashlib.sha256(content).hexdigest(),
            "rows": len(sources),
            "broken": [{"index": i, "reason": reasons[i]} for i in sorted(reasons)],
            "statistics": statistics,
        }
        write_durably(self.path(shard).with_suffix(".json"), _json(manifest))

    def finish(self, max_broken: int) -> dict:
        """Write the manifest and the files for ``datasets.load_from_disk`` once all shards are complete; return the manifest.

        Raises:
            UserError: when more than ``max_broken`` images are broken.
        """
        import datasets

        files = [self.path(i).with_suffix(".json") for i in range(self.num_shards)]
        shards = [_read_json(file, "delete it and run the same command again", SHARD_KEYS) for file in files]
        broken = [entry for shard in shards for entry in shard["broken"]]
        if len(broken) > max_broken:
            raise UserError(
                f"max_broken_fraction: {len(broken)} of {self.settings['num_images']} images are broken; accepted: at most "
                f"{max_broken}"
            )
        statistics = _statistics([shard.pop("statistics") for shard in shards])
        for shard in shards:
            del shard["broken"]
        manifest = self.settings | {
            "num_broken": len(broken),
            "broken": broken,
            "statistics": statistics,
            "warnings": _warnings(statistics),
            "shards": shards,
        }
        text = _json(manifest)
        for stale in self.folder.glob(f"*{PARTIAL}*"):  # left by killed processes
            stale.unlink(missing_ok=True)
        info = datasets.DatasetInfo(features=self.features())
        write_durably(self.folder / "dataset_info.json", _json({"features": info.features.to_dict()}))
        state: dict = {
            "_data_files": [{"filename": shard["file"]} for shard in shards],
            "_fingerprint": state_fingerprint(text),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": "train",
        }
        write_durably(self.folder / STATE_FILE, _json(state))
        write_durably(self.folder / MANIFEST_FILE, text)
        return manifest


def _read_json(file: Path, accepted: str, keys: frozenset[str] = frozenset()) -> dict:
    def check(value: Any) -> dict:
        if not isinstance(value, dict) or keys - value.keys():
            raise ValueError(f"not an object with {', '.join(sorted(keys)) or 'fields'}")
        return value

    try:
        return read_json(file, check)
    except ValueError as error:
        raise UserError(f"output: {error}; accepted: {accepted}") from error


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _refuse_other_settings(folder: Path, saved: dict, current: dict) -> None:
    def comparable(settings: dict) -> dict:
        flat: dict = {}
        for name, value in settings.items():
            flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        return {name: value for name, value in flat.items() if name not in ("source.path", "codec.path")}

    old, new = comparable(saved), comparable(current)
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        raise UserError(
            f"output: {folder} holds latents of another {changed[0]}: {_short(old.get(changed[0]))} there, "
            f"{_short(new.get(changed[0]))} now (differing: {', '.join(changed)}); accepted: the same, or another folder"
        )


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _sums(latents: list[Tensor]) -> dict:
    """Return per-channel count, sums and sums of squares, and the minimum and maximum of latents [n, C, H, W], mirrored included.

    Uses float64 over chunks of fixed size, so that the result is bit-identical for all encoding batch sizes.
    """
    sums = squares = np.zeros(latents[0].shape[1])
    lowest, highest = np.inf, -np.inf
    for column in latents:
        for first in range(0, len(column), STATISTICS_ROWS):
            values = column[first : first + STATISTICS_ROWS].double().numpy()
            sums = sums + values.sum(axis=(0, 2, 3))
            squares = squares + np.square(values).sum(axis=(0, 2, 3))
            lowest, highest = min(lowest, values.min()), max(highest, values.max())
    count = sum(column.shape[0] * column.shape[2] * column.shape[3] for column in latents)
    return {
        "count_per_channel": count,
        "sums": sums.tolist(),
        "squares": squares.tolist(),
        "min": float(lowest),
        "max": float(highest),
    }


def _statistics(shards: list[dict]) -> dict:
    """Return mean and standard deviation over all shards, in total and per channel."""
    count = sum(shard["count_per_channel"] for shard in shards)
    mean = np.sum([shard["sums"] for shard in shards], axis=0) / count
    square = np.sum([shard["squares"] for shard in shards], axis=0) / count
    return {
        "mean": float(mean.mean()),
        "std": float(np.sqrt(max(square.mean() - mean.mean() ** 2, 0.0))),
        "min": min(shard["min"] for shard in shards),
        "max": max(shard["max"] for shard in shards),
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(np.maximum(square - mean**2, 0.0)).tolist(),
    }


def _warnings(statistics: dict) -> list[str]:
    low, high = UNIT_STD
    if low <= statistics["std"] <= high:
        return []
    return [
        f"the latents' standard deviation is {statistics['std']:.4g}, outside {low:g} to {high:g}: the flow runs from noise of "
        "unit variance, so latents should have about that; is the scaling factor that of this checkpoint?"
    ]
