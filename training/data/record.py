"""The record of a run's data (data.json), which ensures that the run resumes with the data it was started with.

{"name", "length", "fingerprint", "before": [the same fields for earlier data of the run, with "until_step"]}
"""

import json
from pathlib import Path

import torch.distributed as dist

from latte_flow.training.data.images import ImageDataset
from latte_flow.training.data.latents.dataset import ENCODE_AGAIN, LatentDataset
from latte_flow.training.distributed.collectives import gather, is_first_rank
from latte_flow.training.durable import write_durably
from latte_flow.training.errors import UserError

SAID_BYTES = 2**31
"""Reading more than this is announced."""


class DataRecord:
    """Compares the data of a run that starts or resumes with the data on record.

    Args:
        dataset: the current data.
        file: data.json of the run; missing for a new run.
        allow_changed: data.allow_changed.

    Attributes:
        is_new: whether the data differ from those on record, or there is no record.

    Raises:
        UserError: when the data differ from those on record and that is not allowed, or the record is damaged.
    """

    def __init__(self, dataset: ImageDataset | LatentDataset, file: Path, *, allow_changed: bool):
        self.dataset, self.file = dataset, file
        self._recorded = _read(file)
        self.is_new = self._recorded is None or self._recorded["fingerprint"] != dataset.fingerprint
        if self._recorded is not None and self.is_new and not allow_changed:
            raise UserError(
                f"data.path: {dataset.name} has changed since this run was started (fingerprint {self._recorded['fingerprint']} "
                f"then, {dataset.fingerprint} now); accepted: the same data, another output_dir, or --data.allow_changed true, "
                "which continues with the changed data"
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

    def update(self, step: int) -> None:
        """Record new data, keep the earlier ones on record, and print the change. Rank 0 only.

        Args:
            step: number of optimizer steps done on the earlier data.
        """
        if not self.is_new:
            return
        record = {"name": self.dataset.name, "length": len(self.dataset), "fingerprint": self.dataset.fingerprint}
        if self._recorded is not None:
            before = self._recorded.pop("before")
            record["before"] = [*before, self._recorded | {"until_step": step}]
            print(
                f"data.allow_changed: {self.dataset.name} has changed (fingerprint {self._recorded['fingerprint']} up to step "
                f"{step}, {self.dataset.fingerprint} now); the run continues with the changed data",
                flush=True,
            )
        write_durably(self.file, (json.dumps(record, indent=1) + "\n").encode())
        self.is_new = False


def _read(file: Path) -> dict | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record["fingerprint"], str) or not isinstance(record.setdefault("before", []), list):
            raise TypeError("fingerprint, before: wrong types")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: damaged ({type(error).__name__}: {error}); accepted: the file as the run wrote it; without it the "
            "current data are assumed to be those the run was started with"
        ) from error
