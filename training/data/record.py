"""What a run records of its data (data.json), so that it goes on with the data that it was started with.

{"name", "length", "fingerprint", "before": [the same of data that it had before, with "until_step"]}
"""

import json
import os
from pathlib import Path

import torch.distributed as dist

from training.data.images import ImageDataset
from training.data.latents import ENCODE_AGAIN, LatentDataset
from training.errors import UserError


def describe_data(dataset: ImageDataset | LatentDataset) -> dict:
    """Return what a run records of its data."""
    return {"name": dataset.name, "length": len(dataset), "fingerprint": dataset.fingerprint}


def read_record(file: Path) -> dict | None:
    """Return what data.json holds; None when there is none.

    Raises:
        UserError: when it is damaged.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record["fingerprint"], str) or not isinstance(record.setdefault("before", []), list):
            raise TypeError("fingerprint, before: wrong types")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file}: damaged ({type(error).__name__}: {error}); accepted: the file that the run wrote; without it the data are "
            "taken for those that the run was started with"
        ) from error


def check_same_data(dataset: ImageDataset | LatentDataset, record: dict | None, *, allow_changed: bool) -> bool:
    """Refuse to go on with a run on other data than it had, unless that is allowed; return whether they are new to it.

    Args:
        dataset: the data now.
        record: ``read_record``.
        allow_changed: data.allow_changed.

    Raises:
        UserError: when the fingerprint is another and that is not allowed.
    """
    if record is not None and record["fingerprint"] != dataset.fingerprint and not allow_changed:
        raise UserError(
            f"data.path: {dataset.name} has changed since this run was started (fingerprint {record['fingerprint']} then, "
            f"{dataset.fingerprint} now); accepted: the same data, another output_dir, or --data.allow_changed true, which goes "
            "on with the changed data"
        )
    return record is None or record["fingerprint"] != dataset.fingerprint


def verify_data(dataset: ImageDataset | LatentDataset) -> None:
    """Compare latents with the SHA-256 of their files, each rank a share of them: a flipped bit shows nowhere else. Collective.

    Raises:
        UserError: on every rank, when a file is damaged.
    """
    if not isinstance(dataset, LatentDataset):
        return
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, dataset.damaged_shards(dist.get_rank(), dist.get_world_size()))
    if damaged := [problem for part in parts for problem in part]:
        raise UserError(
            f"data.path: {'; '.join(damaged[:3])}{f' and {len(damaged) - 3} more' if damaged[3:] else ''}; accepted: "
            f"{ENCODE_AGAIN}"
        )


def write_record(dataset: ImageDataset | LatentDataset, file: Path, record: dict | None, step: int) -> None:
    """Record data that are new to a run; those that it had before are kept in the record.

    Args:
        dataset: the data now.
        file: data.json; replaced as a whole.
        record: what it holds.
        step: optimizer steps done on the data before.
    """
    before = [] if record is None else [*record["before"], _without(record, "before") | {"until_step": step}]
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(describe_data(dataset) | {"before": before}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _without(record: dict, key: str) -> dict:
    return {name: value for name, value in record.items() if name != key}
