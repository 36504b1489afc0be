"""Checkpoints: DeepSpeed's files, written under a commit protocol, and read back by a resuming run or by the tools.

DeepSpeed's ``latest`` is no commit marker: rank 0 writes it before the other ranks' shards exist. So a checkpoint is saved into
``step_XXXXXXX.partial``; when all ranks are done, every file's size and SHA-256 go into manifest.json, the folder is renamed into
place, and only then does ``latest`` name it. A folder is a checkpoint exactly if its manifest verifies.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model.pipeline import PIPELINE_FILE, LatteFlowPipeline
from training.checkpoint_io import TolerantCheckpointEngine, safe_unpickling
from training.checkpoint_manifest import MANIFEST, OWN_DIGEST, manifest_digest, read_manifest
from training.elastic import load_resharded
from training.ema import EMA_KEY
from training.errors import UserError
from training.zero import master_shards
from training.zero_shards import OPTIMIZER_SUFFIX, ZeroShards

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
"""Where an output_dir keeps the model folder without weights (model/pipeline.py), beside ``checkpoints``."""
LATEST = "latest"
PARTIAL_SUFFIX = ".partial"
STEP_FOLDER = re.compile(r"step_\d{7,}")
WEIGHTS = ("ema", "model")


def step_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:07d}"


class CheckpointStore:
    """The checkpoints of one run, shared by all ranks. Its methods are collective.

    Args:
        folder: ``output_dir/checkpoints``, on a file system that all ranks see.
        keep_last: how many of the newest are kept; 0 keeps all.
        keep_every: checkpoints of steps that are multiples of it are kept as well; 0 for none.

    Attributes:
        failed_saves: how many could not be written since the start of the process.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int = 0):
        self.folder = folder
        self.keep_last, self.keep_every = keep_last, keep_every
        self.failed_saves = 0

    def save(self, engine, step: int, client_state: dict) -> Path | None:
        """Write and commit a checkpoint of the engine; a valid one of this step is left as it is, a damaged one replaced.

        One that cannot be written (a full disk, a file system that went away) is counted and said, and what there was stays.

        Args:
            engine: the DeepSpeed engine.
            step: optimizer steps done.
            client_state: what the trainer needs to go on, beside the weights and the optimizer.

        Returns:
            The checkpoint's folder; None when it could not be written.
        """
        problem = self._write(engine, step, client_state)
        final = self.folder / step_name(step)
        if problem is None:
            return final
        self.failed_saves += 1
        if _is_first_rank():
            shutil.rmtree(final.with_name(final.name + PARTIAL_SUFFIX), ignore_errors=True)
            print(
                f"checkpoint {final.name} NOT saved: {problem}; earlier ones are untouched, training goes on",
                flush=True,
            )
        dist.barrier()
        return None

    def _write(self, engine, step: int, client_state: dict) -> str | None:
        """Do the work of ``save``; return why it failed, the same on all ranks."""
        final = self.folder / step_name(step)
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        if _agree(final.exists()) and not _gather_dict(dict(_check_files(final, _share))):
            return None
        problem, needed = None, _bytes_to_write(engine)
        if _is_first_rank():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
                free = shutil.disk_usage(self.folder).free
                if free < needed:
                    problem = f"it needs {needed / 2**30:.3g} GiB, {self.folder} has {free / 2**30:.3g} GiB free"
            except OSError as error:
                problem = str(error)
        if problem := _agree(problem):
            return problem
        if not isinstance(engine.checkpoint_engine, TolerantCheckpointEngine):
            engine.checkpoint_engine = TolerantCheckpointEngine(engine._config)
        engine.save_checkpoint(str(self.folder), tag=partial.name, client_state=client_state, save_latest=False)
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, engine.checkpoint_engine.take_errors())
        if any(errors):
            return "; ".join(message for part in errors for message in part)
        # Listed by one rank: on a network file system others may see fewer files, and shares of different lists leave gaps.
        files = [partial / name for name in _agree(sorted(p.name for p in partial.iterdir() if p.is_file()))]
        shards = sum(path.name.endswith(OPTIMIZER_SUFFIX) for path in files)
        if shards != dist.get_world_size():
            return f"{partial} has {shards} files *{OPTIMIZER_SUFFIX} of {dist.get_world_size()} ranks"
        entries = _gather_dict({path.name: _describe(path) for path in _share(files)})
        if _is_first_rank():
            manifest = {
                "step": step,
                "world_size": dist.get_world_size(),
                "zero_stage": engine.zero_optimization_stage(),
                "files": dict(sorted(entries.items())),
            }
            manifest[OWN_DIGEST] = manifest_digest(manifest)
            try:
                self._commit(partial, final, manifest)
            except OSError as error:
                problem = str(error)
        return _agree(problem)

    def _commit(self, partial: Path, final: Path, manifest: dict) -> None:
        """Make a checkpoint of files that are all there, on the first rank."""
        _write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        os.replace(partial, final)
        _write_durably(self.folder / (LATEST + PARTIAL_SUFFIX), final.name)
        os.replace(self.folder / (LATEST + PARTIAL_SUFFIX), self.folder / LATEST)
        _sync(self.folder)
        self._remove_old(final)

    def newest_valid(self) -> Path | None:
        """Return the newest checkpoint whose manifest verifies, the same on all ranks; None when there is none at all.

        Raises:
            UserError: when there are checkpoints and every one is damaged: starting again from nothing would lose the run.
        """
        return newest_valid(list_checkpoints(self.folder))

    def load(self, engine, path: Path, *, same_run: bool = True) -> dict:
        """Load a checkpoint, of any number of ranks and any ZeRO stage, into the engine and return its client state.

        Shards that fit are read by DeepSpeed, each rank its own, and losses go on bit for bit; others are cut anew
        (training/elastic.py), and losses go on to rounding: sums over ranks have another order.

        Args:
            engine: a DeepSpeed engine that has not trained yet.
            path: a step's folder, verified.
            same_run: False keeps the optimizer's settings as this run's configuration has them, for another run's checkpoint.

        Raises:
            UserError: when it cannot be read, or is of another network.
        """
        manifest = read_manifest(path)
        stages = manifest["zero_stage"], engine.zero_optimization_stage()
        fits = manifest["world_size"] == dist.get_world_size() and (stages[0] == 3) == (stages[1] == 3)
        with safe_unpickling(path):
            if not (fits and same_run):
                return load_resharded(engine, path)
            loaded, client_state = engine.load_checkpoint(
                str(path.parent), tag=path.name, load_lr_scheduler_states=False
            )
        if loaded is None:
            raise UserError(f"{path}: DeepSpeed could not load it")
        return client_state

    def _remove_old(self, committed: Path) -> None:
        """Remove all but the newest ``keep_last`` that are whole, those of ``keep_every``, and the one just committed.

        A checkpoint that has lost a file since does not count. Sizes are looked at, not contents: reading them all at every save
        would take as long as the save.
        """
        if not self.keep_last:
            return
        paths, whole = list_checkpoints(self.folder), 0
        # Later steps than the one just saved are damaged, or the run would have resumed from them: they do not count.
        for path in reversed(paths[: paths.index(committed) + 1]):
            milestone = self.keep_every and int(path.name.removeprefix("step_")) % self.keep_every == 0
            if whole >= self.keep_last and not milestone:
                shutil.rmtree(path)
            whole += not any(_check_files(path, list, contents=False))


def newest_valid(candidates: list[Path]) -> Path | None:
    """Return the last of some checkpoints whose manifest verifies, the same on all ranks; None of none. Collective.

    Each rank verifies a share of the files; the list is rank 0's.

    Raises:
        UserError: when every one is damaged.
    """
    candidates = _agree(candidates)
    for path in reversed(candidates):
        problems = _gather_dict(dict(_check_files(path, _share)))
        if not problems:
            return path
        if _is_first_rank():
            print(f"checkpoint {path} skipped: " + "; ".join(f"{k} {v}" for k, v in sorted(problems.items())))
    if candidates:
        raise UserError(
            f"{candidates[0].parent}: holds {len(candidates)} checkpoints and every one is damaged; none can be resumed"
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of a run's steps, oldest first; partial ones are none. One without a manifest is a damaged one."""
    paths = [path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: (len(path.name), path.name))  # step_10000000 comes after step_9999999


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that a path means: a step's folder, or the newest valid one of an output_dir.

    Raises:
        UserError: when there is none.
    """
    if (path / MANIFEST).is_file() or STEP_FOLDER.fullmatch(path.name):
        problems = dict(_check_files(path, list))
        if problems:
            raise UserError(f"{path}: damaged: " + "; ".join(f"{name} {what}" for name, what in problems.items()))
        return path
    for candidate in reversed(list_checkpoints(path / "checkpoints")):
        problems = dict(_check_files(candidate, list))
        if not problems:
            return candidate
        logger.warning("%s skipped: %s", candidate, "; ".join(f"{name} {what}" for name, what in problems.items()))
    raise UserError(f"{path}: holds no valid checkpoint; accepted: a training output_dir, or one step's folder of it")


def load_pipeline(path: Path, *, weights: str = "ema", dtype: torch.dtype = torch.float32) -> LatteFlowPipeline:
    """Load what a CHECKPOINT argument names: a training output_dir, one step's folder of it, or an exported model folder.

    Args:
        path: the folder.
        weights: ``ema`` or ``model``, for training checkpoints; an exported folder holds one kind.
        dtype: the type of the networks.

    Raises:
        UserError: when the folder is none of these, or is damaged.
    """
    try:
        if (path / PIPELINE_FILE).is_file():
            return LatteFlowPipeline.from_pretrained(path, dtype=dtype)
        checkpoint = find_checkpoint(path)
        components = checkpoint.parent.parent / MODEL_FOLDER
        return LatteFlowPipeline.from_pretrained(components, weights=read_weights(checkpoint, weights), dtype=dtype)
    except (FileNotFoundError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def read_weights(path: Path, which: str) -> dict[str, Tensor]:
    """Read the float32 weights of a checkpoint from its ZeRO shards, on the CPU.

    Args:
        path: a checkpoint's folder.
        which: ``ema``, the averaged weights, or ``model``, the trained ones.

    Returns:
        Parameter and buffer name -> tensor, as LatteFlowModel.state_dict.

    Raises:
        UserError: when ``which`` is unknown or the checkpoint has no such weights.
    """
    if which not in WEIGHTS:
        raise UserError(f"weights: {which!r} is unknown; accepted values: {', '.join(WEIGHTS)}")
    with safe_unpickling(path):
        shards = ZeroShards(path)
        if which == "model":
            return shards.read_all()
        if EMA_KEY not in shards.state_keys:
            raise UserError(f"{path}: holds no averaged weights; accepted: --weights model")
        return shards.read_all(EMA_KEY)


def _check_files(path: Path, share, *, contents: bool = True):
    """Yield (file name, problem) for each of this rank's share of the files that is not what the manifest says.

    Args:
        path: a checkpoint's folder.
        share: list -> this rank's part of it.
        contents: whether to read the files, too.
    """
    try:
        files = read_manifest(path)["files"]
    except UserError as error:
        yield MANIFEST, str(error)
        return
    for name in share(sorted(files)):
        entry, file = files[name], path / name
        try:
            if not file.is_file():
                yield name, "is missing"
            elif file.stat().st_size != entry["bytes"]:
                yield name, f"has {file.stat().st_size} bytes instead of {entry['bytes']}"
            elif contents and _describe(file)["sha256"] != entry["sha256"]:
                yield name, "has another SHA-256 than the manifest"
        except OSError as error:  # a rank that raised here would leave the others in a collective
            yield name, f"cannot be read: {error.strerror}"


def _describe(path: Path) -> dict:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _bytes_to_write(engine) -> int:
    """Return about how many bytes a checkpoint takes over all ranks. Collective."""
    shards = [*master_shards(engine.optimizer)]
    shards += [t for state in engine.optimizer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    held = torch.tensor(sum(t.nbytes for t in shards), dtype=torch.float64, device=engine.device)
    dist.all_reduce(held)
    return int(held) + sum(p.nbytes for p in engine.module.parameters())


def _share(items: list) -> list:
    """Return this rank's share of a list."""
    return items[dist.get_rank() :: dist.get_world_size()]


def _gather_dict(mine: dict) -> dict:
    """Return the union of all ranks' dicts. Collective."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def _agree(value):
    """Return rank 0's value, its view of the file system for example. Collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _is_first_rank() -> bool:
    return dist.get_rank() == 0


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
