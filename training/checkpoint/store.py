"""Checkpoints of a run: saves DeepSpeed's files with a commit protocol, and loads them.

DeepSpeed's ``latest`` is not a commit marker: rank 0 writes it before the other ranks' shards exist. A checkpoint is therefore
saved into ``step_XXXXXXX.partial``; when all ranks are done, the size and SHA-256 of every file go into manifest.json, the folder
is renamed atomically, and only then is ``latest`` updated. A folder is a checkpoint if and only if its manifest verifies.

An asynchronous save copies the state to host memory and leaves the rest to a thread on each rank.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from latte_flow.model.files import read_json
from latte_flow.training.checkpoint.elastic import load_resharded
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.formats.zero_source import ZeroSource
from latte_flow.training.checkpoint.io import DeferringCheckpointEngine, TolerantCheckpointEngine, safe_unpickling
from latte_flow.training.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    OWN_DIGEST,
    PARTIAL_SUFFIX,
    RUN_ID,
    STEP_FOLDER,
    TENSOR_PARALLEL,
    check_files,
    check_manifest,
    describe_file,
    list_checkpoints,
    manifest_digest,
    read_manifest,
    step_name,
)
from latte_flow.training.distributed.collectives import agree, gather, is_first_rank, share
from latte_flow.training.distributed.zero import layout, master_shards
from latte_flow.training.durable import PARTIAL, sync_folder, write_durably, write_synced
from latte_flow.training.errors import UserError, naming

PARTIAL_STEP = re.compile(STEP_FOLDER.pattern + re.escape(PARTIAL_SUFFIX), re.ASCII)
PARTIAL_LATEST = re.compile(re.escape(LATEST + PARTIAL) + r".+-\d+", re.ASCII)
"""Names of what an interrupted save leaves: its folder, and the file of ``write_durably``."""


class CheckpointStore:
    """The checkpoints of one run, shared by all ranks. The constructor and all methods except ``wait`` are collective.

    Args:
        folder: ``output_dir/checkpoints``, on a file system visible to all ranks.
        keep_last: number of newest checkpoints to keep; 0 keeps all.
        keep_every: checkpoints at multiples of this step are kept as well; 0 disables this.
        asynchronous: whether training continues while files are written.
        run_id: identifies the run; checkpoints of another run are refused. None accepts those of any run.

    Attributes:
        failed_saves: number of failed saves since the start of the process.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        keep_every: int = 0,
        *,
        asynchronous: bool = False,
        run_id: str | None = None,
    ):
        self.folder = folder
        self.run_id = run_id
        self.keep_last, self.keep_every = keep_last, keep_every
        self.asynchronous = asynchronous
        self.failed_saves = 0
        self._saved = True
        self._thread: threading.Thread | None = None
        # Collectives of the thread must not interleave with those of the training; gloo needs no device.
        self._group: Any = dist.new_group(backend="gloo") if asynchronous else None

    def save(self, engine, step: int, client_state: dict) -> None:
        """Write and commit a checkpoint of the engine; an existing valid one of this step is kept, a damaged one replaced.

        A failed save (disk full, file system unavailable) is counted and reported, and earlier checkpoints stay. ``wait`` returns
        whether the save succeeded. An asynchronous save waits for the previous one and returns once the state is copied.

        Args:
            engine: the DeepSpeed engine.
            step: number of optimizer steps done.
            client_state: what the trainer needs to resume, apart from the weights and the optimizer state.
        """
        self.wait()
        final = self.folder / step_name(step)
        exists = agree(is_first_rank() and final.exists())
        self._saved = exists and not _gather_dict(dict(check_files(final, share)))
        if self._saved:
            return
        problem = self._prepare(final, _bytes_to_write(engine))
        if problem is None:
            self._use_own_files(engine)
            tag = final.name + PARTIAL_SUFFIX
            engine.save_checkpoint(str(self.folder), tag=tag, client_state=client_state, save_latest=False)
        manifest = {
            "step": step,
            "world_size": dist.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            TENSOR_PARALLEL: engine.mp_world_size,
            "layout": layout(engine),
            RUN_ID: self.run_id,
        }
        arguments = (final, problem, engine.checkpoint_engine, manifest)
        if not self.asynchronous:
            self._finish(*arguments)
            return
        self._thread = threading.Thread(target=self._finish_in_thread, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _use_own_files(self, engine) -> None:
        """Make DeepSpeed write and read its files through checkpoint/io.py."""
        kind = DeferringCheckpointEngine if self.asynchronous else TolerantCheckpointEngine
        if not isinstance(engine.checkpoint_engine, kind):
            engine.checkpoint_engine = kind(engine._config)
            # DeepSpeed would copy its scripts next to the checkpoints: an error there would be raised on rank 0 only.
            engine._copy_recovery_script = lambda save_path: None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the newest save; return whether it succeeded.

        Args:
            timeout: seconds; None waits without limit.
        """
        if self._thread is not None:
            self._thread.join(timeout)
        return self._saved

    def _prepare(self, final: Path, needed: int) -> str | None:
        """Prepare the folder and check the free space. Return the reason it failed or None, the same on all ranks."""
        problem = None
        if is_first_rank():
            try:
                self.folder.mkdir(exist_ok=True)
                self._remove_unfinished()
                partial = final.with_name(final.name + PARTIAL_SUFFIX)
                if os.path.lexists(partial):
                    problem = f"{partial} is in the way, and not a folder left by a save"
                free = shutil.disk_usage(self.folder).free
                if free < needed:
                    problem = f"it needs {needed / 2**30:.3g} GiB, {self.folder} has {free / 2**30:.3g} GiB free"
            except OSError as error:
                problem = str(error)
        return agree(problem)

    def _finish_in_thread(self, final: Path, *arguments) -> None:
        try:
            self._finish(final, *arguments)
        except Exception as error:  # from a collective, when another rank is gone: the main thread will fail too
            self._saved = False
            self.failed_saves += 1
            print(f"checkpoint {final.name} NOT saved: {type(error).__name__}: {error}", flush=True)

    def _finish(self, final: Path, problem: str | None, files: TolerantCheckpointEngine, manifest: dict) -> None:
        """Write pending files and commit; on a problem, remove the partial checkpoint."""
        problem = problem or self._write_and_commit(final, files, manifest)
        if problem is None and is_first_rank():
            self.clean_up(final)
        if problem is not None:
            self.failed_saves += 1
            if is_first_rank():
                shutil.rmtree(final.with_name(final.name + PARTIAL_SUFFIX), ignore_errors=True)
                print(
                    f"checkpoint {final.name} NOT saved: {problem}; earlier ones are untouched, training continues",
                    flush=True,
                )
            dist.barrier(self._group)
        self._saved = problem is None

    def _write_and_commit(self, final: Path, engine_files: TolerantCheckpointEngine, manifest: dict) -> str | None:
        """Return the reason it failed or None, the same on all ranks. File system errors are exchanged, never raised."""
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        if problem := self._any_problem("; ".join(engine_files.finish())):
            return problem
        problem, names, mine = "", None, {}
        # Rank 0 lists the files: on a network file system other ranks may see fewer, and shares of different lists leave gaps.
        if is_first_rank():
            try:
                names = sorted(path.name for path in partial.iterdir() if path.is_file())
            except OSError as error:
                problem = str(error)
        names = agree(names, self._group)
        try:
            mine = {name: describe_file(partial / name) for name in share(names or [])}
        except OSError as error:
            problem = str(error)
        if problem := self._any_problem(problem):
            return problem
        entries = _gather_dict(mine, self._group)
        if is_first_rank():
            manifest = manifest | {"files": dict(sorted(entries.items()))}
            try:
                check_manifest(manifest)
                self._commit(partial, final, manifest | {OWN_DIGEST: manifest_digest(manifest)})
            except (OSError, ValueError) as error:  # ValueError: a rank's file is missing
                problem = str(error)
        return agree(problem, self._group) or None

    def _any_problem(self, mine: str) -> str:
        """Return the problems of all ranks as one line, empty if there are none. Collective."""
        return "; ".join(part for part in gather(mine, self._group) if part)

    def _commit(self, partial: Path, final: Path, manifest: dict) -> None:
        """Turn a complete partial folder into a checkpoint. Rank 0 only."""
        write_synced(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(partial)
        with suppress(OSError):
            _remove(final)  # a damaged one
        os.replace(partial, final)
        sync_folder(self.folder)

    def clean_up(self, newest: Path) -> None:
        """Write the newest checkpoint's name to ``latest`` and remove old checkpoints; errors do not invalidate the checkpoint.

        Rank 0 only, after every save and at the start, because a run may be killed right after a commit.
        """
        try:
            self._remove_unfinished()
            write_durably(self.folder / LATEST, newest.name.encode())
            self._remove_old(newest)
        except (OSError, UserError) as error:
            print(f"checkpoint {newest.name} is saved, but old ones could not be removed: {error}", flush=True)

    def _remove_unfinished(self) -> None:
        """Remove what runs that were killed while saving have left, and nothing under a name that no save gives."""
        for left in self.folder.iterdir():
            if PARTIAL_STEP.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif PARTIAL_LATEST.fullmatch(left.name) and left.is_file():
                left.unlink()

    def newest_valid(self) -> Path | None:
        """Return the newest checkpoint whose manifest verifies, the same on all ranks, or None if there are no checkpoints.

        Raises:
            UserError: when there are checkpoints but all are damaged: starting from scratch would lose the run. Also
                when one belongs to another run or to another step than its folder's name: this run would overwrite it.
        """
        problem = agree(self._find_foreign() if is_first_rank() else None)
        if problem is not None:
            raise UserError(problem)
        return newest_valid(list_checkpoints(self.folder))

    def _find_foreign(self) -> str | None:
        """Return an error for a checkpoint that does not belong here, or None. Damaged ones are handled elsewhere."""
        for path in list_checkpoints(self.folder):
            try:
                run_id, step = read_json(path / MANIFEST, lambda manifest: (manifest.get(RUN_ID), manifest["step"]))
            except ValueError:
                continue
            if type(step) is int and path.name != step_name(step):
                return (
                    f"{path}: is the checkpoint of step {step}; accepted: its name, {step_name(step)}, or another place"
                )
            if None not in (run_id, self.run_id) and run_id != self.run_id:
                return (
                    f"{path}: is a checkpoint of another run ({run_id}; this one is {self.run_id}); accepted: another place for "
                    f"it, or another output_dir with --resume {path}"
                )
        return None

    def load(self, engine, path: Path, *, same_run: bool = True) -> dict:
        """Load a checkpoint, of any number of ranks and any ZeRO stage, into the engine and return its client state.

        With an unchanged sharding each rank's shard is read by DeepSpeed, and losses continue bit-exactly. Otherwise the shards
        are resharded (training/checkpoint/elastic.py), and losses agree up to rounding: the order of sums over ranks changes.

        Args:
            engine: a DeepSpeed engine that has not trained yet.
            path: a step's folder or a universal checkpoint, already verified.
            same_run: False, for another run's checkpoint, keeps the optimizer settings of this run's configuration.

        Raises:
            UserError: when it cannot be read or belongs to another network.
        """
        if not (path / MANIFEST).is_file():  # a universal checkpoint, named by ``resume``
            return load_resharded(engine, open_weights(path))
        manifest = read_manifest(path)
        fits = manifest.get("layout") == layout(engine)
        if not fits and is_first_rank():
            before, now = manifest.get(TENSOR_PARALLEL, 1), engine.mp_world_size
            tensor = "" if before == now == 1 else f", tensor_parallel {now} instead of {before}"
            print(
                f"{path} was written by {manifest['world_size']} ranks with ZeRO stage {manifest['zero_stage']}; it is "
                f"resharded for {dist.get_world_size()} with stage {engine.zero_optimization_stage()}{tensor}",
                flush=True,
            )
        self._use_own_files(engine)
        with naming(), safe_unpickling(path):
            if not (fits and same_run):
                return load_resharded(engine, ZeroSource(path))
            loaded, client_state = engine.load_checkpoint(
                str(path.parent), tag=path.name, load_lr_scheduler_states=False
            )
        if loaded is None:
            raise UserError(f"{path}: DeepSpeed could not load it")
        return client_state

    def _remove_old(self, committed: Path) -> None:
        """Remove all checkpoints except the newest ``keep_last`` intact ones and those of ``keep_every``.

        A checkpoint that has since lost a file does not count. Only sizes are checked: reading all contents at every save would
        take as long as the save.
        """
        if not self.keep_last:
            return
        paths, whole = list_checkpoints(self.folder), 0
        # Steps later than the one just saved are damaged, or the run would have resumed from them: they do not count.
        for path in reversed(paths[: paths.index(committed) + 1]):
            milestone = self.keep_every and int(path.name.removeprefix("step_")) % self.keep_every == 0
            if whole >= self.keep_last and not milestone:
                _remove(path)
            whole += not any(check_files(path, list, contents=False))


def _remove(path: Path) -> None:
    """Remove a checkpoint; of a link only the link."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def newest_valid(candidates: list[Path], record: Callable[[Path], dict] = read_manifest) -> Path | None:
    """Return the last checkpoint whose manifest verifies, the same on all ranks, or None of an empty list. Collective.

    Each rank verifies a share of the files; rank 0's list is used.

    Args:
        candidates: checkpoints, oldest first.
        record: reads the record that lists a candidate's files; exported checkpoints have no manifest.

    Raises:
        UserError: when all are damaged.
    """
    candidates = agree(candidates)
    for path in reversed(candidates):
        problems = _gather_dict(dict(check_files(path, share, record=record)))
        if not problems:
            return path
        if is_first_rank():
            print(f"checkpoint {path} skipped: " + "; ".join(f"{k} {v}" for k, v in sorted(problems.items())))
    if candidates:
        raise UserError(f"{candidates[0].parent}: all {len(candidates)} checkpoints are damaged; none can be resumed")
    return None


def _bytes_to_write(engine) -> int:
    """Return the approximate size of a checkpoint in bytes over all ranks. Collective."""
    shards = [*master_shards(engine.optimizer)]
    shards += [t for state in engine.optimizer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    held = torch.tensor(sum(t.nbytes for t in shards), dtype=torch.float64, device=engine.device)
    dist.all_reduce(held)
    return int(held) + sum(p.nbytes for p in engine.module.parameters()) * engine.mp_world_size


def _gather_dict(mine: dict, group=None) -> dict:
    """Return the union of all ranks' dicts. Collective."""
    return {key: value for part in gather(mine, group) for key, value in part.items()}
