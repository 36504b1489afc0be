"""The record of what a run reads (data.json), which ensures that it resumes with the data, prompts and files it began with.

    {"name", "length", "fingerprint", "prompts", "files": {"codec.path/config.json": SHA-256, ...},
     "before": [the same fields for earlier data of the run, with "until_step"]}

Records of older versions have no ``prompts`` and ``files``: any are accepted, and recorded then.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch.distributed as dist

from latte_flow.model.files import read_json
from latte_flow.training.data.images import ImageDataset
from latte_flow.training.data.latents.dataset import ENCODE_AGAIN, LatentDataset
from latte_flow.training.distributed.collectives import gather, is_first_rank
from latte_flow.training.durable import write_durably
from latte_flow.training.errors import UserError

SAID_BYTES = 2**31
"""Reading more than this is announced."""
OWN_FILES = "model/"
"""Prefix of the files on record that the run has written itself."""


class DataRecord:
    """Compares the data and files of a run that starts or resumes with those on record.

    Args:
        dataset: the current data.
        file: data.json of the run; missing for a new run.
        allow_changed: data.allow_changed.

    Attributes:
        is_new: whether the data differ from those on record, or there is no record.
        files: the files on record, name -> SHA-256 (run_folder.hash_files); None if there are none.

    Raises:
        UserError: when the data or prompts differ from those on record and that is not allowed, or the record is damaged.
    """

    def __init__(self, dataset: ImageDataset | LatentDataset, file: Path, *, allow_changed: bool):
        self.dataset, self.file = dataset, file
        self._prompts = _prompts_fingerprint(dataset)
        self._recorded = _read(file)
        self.is_new = self._recorded.get("fingerprint") != dataset.fingerprint
        self.files: dict[str, str] | None = self._recorded.get("files")
        self._changes = self._compare(self._recorded, "this run")
        if self._changes and not allow_changed:
            raise UserError(
                f"{self._changes[0]}; accepted: the same data and prompts, another output_dir, or --data.allow_changed true, "
                "which continues with the changed ones"
            )

    def verify(self) -> None:
        """Verify the SHA-256 of latent files that are new to the run, each rank a share. Collective.

        A flipped bit in a latent would not be noticed anywhere else.

        Raises:
            UserError: on every rank, when a file is damaged.
        """
        if not self.is_new or not isinstance(self.dataset, LatentDataset):
            return
        total = sum(shard["bytes"] for shard in self.dataset.manifest["shards"])
        if total > SAID_BYTES and is_first_rank():
            print(f"{self.dataset.name}: reading {total / 2**30:.1f} GiB to verify their SHA-256", flush=True)
        parts = gather(self.dataset.damaged_shards(dist.get_rank(), dist.get_world_size()))
        if damaged := [problem for part in parts for problem in part]:
            more = f" and {len(damaged) - 3} more" if damaged[3:] else ""
            raise UserError(f"data.path: {'; '.join(damaged[:3])}{more}; accepted: {ENCODE_AGAIN}")

    def check_files(self, files: dict[str, str], *, own: bool) -> None:
        """Compare the files that shape prompts, latents and samples with those on record.

        Args:
            files: the current ones, name -> SHA-256.
            own: whether they are those in model/, or all others.

        Raises:
            UserError: when one has changed, is missing or is new; the message names it.
        """
        if changes := _compare_files(self._recorded, files, own):
            more = f" and {len(changes) - 3} more" if changes[3:] else ""
            raise UserError(
                f"{', '.join(changes[:3])}{more} since this run was started ({self.file} holds the SHA-256 of these files); "
                "accepted: the files as they were, or another output_dir, with --resume to start from a checkpoint of this run"
            )

    def differences_from(self, other: Path, files: dict[str, str]) -> list[str]:
        """Return one line for each difference from another run's record, which may be missing.

        Args:
            other: its data.json.
            files: the current ones outside model/, name -> SHA-256.
        """
        recorded = _read(other)
        changes = [f"{change} since that run was started" for change in _compare_files(recorded, files, own=False)]
        return self._compare(recorded, "that run") + changes

    def update(self, step: int, files: dict[str, str] | None = None) -> None:
        """Record what is not on record yet, keep earlier data on record, and print changes of the data. Rank 0 only.

        Args:
            step: number of optimizer steps done on the earlier data.
            files: the current files; None for those on record.
        """
        record = {
            "name": self.dataset.name,
            "length": len(self.dataset),
            "fingerprint": self.dataset.fingerprint,
            "prompts": self._prompts,
        }
        if files := files or self.files:
            record["files"] = files
        before = self._recorded.pop("before", [])
        if self._changes:
            before = [*before, self._recorded | {"until_step": step}]
            print(
                f"data.allow_changed: {'; '.join(self._changes)}; after step {step} the run continues with the changed data",
                flush=True,
            )
        if record != self._recorded:
            content = record | ({"before": before} if before else {})
            write_durably(self.file, (json.dumps(content, indent=1) + "\n").encode())
        self.is_new, self._changes, self._recorded = False, [], record | {"before": before}

    def _compare(self, recorded: dict, run: str) -> list[str]:
        """Return one line for each difference of data and prompts from a record; what is not on record does not differ."""
        data, prompts = self.dataset.fingerprint, self._prompts
        field = "data.path" if self.dataset.class_names is None else "data.class_names"
        lines = []
        for what, then, now in (
            (f"data.path: {self.dataset.name} has", recorded.get("fingerprint", data), data),
            (f"{field}: the prompts of {self.dataset.name} have", recorded.get("prompts", prompts), prompts),
        ):
            if then != now:
                lines.append(f"{what} changed since {run} was started (fingerprint {then} then, {now} now)")
        return lines


def _compare_files(recorded: dict, now: dict[str, str], own: bool) -> list[str]:
    """Return what has happened to each file that is not as it was on record; nothing for a record without files."""
    if "files" not in recorded:
        return []
    then = {name: digest for name, digest in recorded["files"].items() if name.startswith(OWN_FILES) == own}
    names = sorted(name for name in then | now if then.get(name) != now.get(name))
    return [
        f"{name} {'is new' if name not in then else 'is missing' if name not in now else 'has changed'}"
        for name in names
    ]


def _prompts_fingerprint(dataset: ImageDataset | LatentDataset) -> str:
    """Return the SHA-256 of all prompts and of which image has which: class names, captions and the template shape them."""
    digest = hashlib.sha256(np.asarray(dataset.prompt_rows, dtype=np.int64).tobytes())
    for prompt in dataset.prompts:
        digest.update(json.dumps(prompt).encode())
    return digest.hexdigest()


def _read(file: Path) -> dict:
    """Return a record; an empty one if the file is missing."""

    def check(record: dict) -> dict:
        types = {"fingerprint": str, "prompts": str, "files": dict, "before": list}
        wrong = [name for name, kind in types.items() if not isinstance(record.get(name, kind()), kind)]
        if wrong or "fingerprint" not in record:
            raise TypeError(f"{', '.join(wrong) or 'fingerprint'}: wrong type or missing")
        return record

    if not os.path.lexists(file):
        return {}
    try:
        return read_json(file, check)
    except ValueError as error:
        raise UserError(
            f"{error}; accepted: the file as the run wrote it; without it the current data and files are assumed to be those the "
            "run was started with"
        ) from error
