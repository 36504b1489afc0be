"""The moments of a training run that a fault can be put into: made long, and announced, inside the ranks.

As a script it is training/main.py with such a moment, and takes the same command line.

The product knows nothing of this. What takes a millisecond in a small run (a write, a rename, a batch) is wrapped in the ranks'
processes so that it takes ``Watch.seconds``; before and after, a line goes to a file of events that the campaign reads. The
wrappers sit at torch and the operating system where they can, so that they hold however the product saves.

Events are JSON objects, one a line: event, rank, pid, and for some step:

    start    the process has begun
    train    the step begins, its batch not yet fetched
    inside   the moment has begun
    past     the moment is over
"""

import io
import json
import os
import re
import runpy
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "LATTE_FLOW_FAULT_WATCH"
"""The environment variable that hands a Watch to the ranks."""

LAUNCH, BUILD, STEP, ANYWHERE, DATA, GRID, RESUME = (
    "starting, anywhere", "writing the model folder", "in a step", "training, anywhere", "waiting for data",
    "drawing the grid", "reading the checkpoint",
)  # fmt: skip
NO_SHARD, HALF_SHARD, HASHING, HALF_MANIFEST, RENAME, LATEST, REMOVAL = (
    "save: before the shards", "save: a shard half written", "save: before the manifest", "save: the manifest half written",
    "save: before the rename", "save: before latest", "save: an old one half removed",
)  # fmt: skip
SAVE_MOMENTS = (NO_SHARD, HALF_SHARD, HASHING, HALF_MANIFEST, RENAME, LATEST, REMOVAL)


@dataclass(frozen=True)
class Watch:
    """What the ranks announce, and what they make long.

    Args:
        events: path of the file of events.
        moment: one of this module's.
        step: the optimizer step, counted from 1, whose moment it is; moments before the first step have none.
        seconds: how long the moment is made; LAUNCH and ANYWHERE are left as they are.
        rank: whose shard HALF_SHARD means; the other moments come wherever they come.
        first_index: global index of the step's first sample, for DATA.
    """

    events: str
    moment: str = ANYWHERE
    step: int = 0
    seconds: float = 0.0
    rank: int = 0
    first_index: int = -1

    def variables(self) -> dict[str, str]:
        """Return the environment variable that hands this to the ranks."""
        return {VARIABLE: json.dumps(asdict(self))}


def read_events(path: Path) -> list[dict]:
    """Return the events so far; a line that is being written does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Moments:
    """Wraps what a Watch names, in a process of a rank. Each moment comes once a process."""

    def __init__(self, watch: Watch):
        self.watch = watch
        self.rank = int(os.environ["RANK"])
        self.step = 0
        self._came = False

    def announce(self, event: str, **fields) -> None:
        """Append an event."""
        line = json.dumps({"event": event, "rank": self.rank, "pid": os.getpid(), **fields}) + "\n"
        descriptor = os.open(self.watch.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())  # one write: lines of several processes do not mix
        os.close(descriptor)

    def install(self) -> None:
        """Wrap; imports the training."""
        self._announce_steps()
        installers: dict[str, Callable[[], None]] = {
            LAUNCH: lambda: None,
            ANYWHERE: lambda: None,
            STEP: lambda: None,  # _announce_steps does it
            BUILD: self._in_the_model_folder,
            DATA: self._in_a_sample,
            GRID: self._in_the_grid,
            RESUME: self._in_a_read,
            NO_SHARD: self._in_a_write,
            HALF_SHARD: self._in_a_write,
            HASHING: self._in_a_sync,
            HALF_MANIFEST: self._in_a_sync,
            RENAME: self._in_a_rename,
            LATEST: self._in_a_rename,
            REMOVAL: self._in_a_removal,
        }
        installers[self.watch.moment]()

    def _due(self, moment: str, step: int | None = None) -> bool:
        return moment == self.watch.moment and not self._came and step in (None, self.watch.step)

    def _stay(self) -> None:
        """Be inside the moment for its time."""
        self._came = True
        self.announce("inside", step=self.watch.step)
        time.sleep(self.watch.seconds)
        self.announce("past", step=self.watch.step)

    def _wait_for_the_step(self) -> None:
        """Wait until this rank's training has come to the step, and so waits for its batch."""
        while not any(
            event["event"] == "train" and event["rank"] == self.rank and event["step"] == self.watch.step
            for event in read_events(Path(self.watch.events))
        ):
            time.sleep(0.01)

    def _announce_steps(self) -> None:
        from latte_flow.training.trainer import Trainer

        train_step = Trainer.train_step

        def announcing(trainer, *args, **kwargs):
            self.step = trainer.step + 1
            self.announce("train", step=self.step)
            if self._due(STEP, self.step):
                self._stay()
            return train_step(trainer, *args, **kwargs)

        Trainer.train_step = announcing

    def _in_the_model_folder(self) -> None:
        from latte_flow.training import run_folder

        save_components = run_folder.save_components

        def slow(*args, tokenizer, **kwargs):
            save = tokenizer.save_pretrained

            def save_and_stay(*args, **kwargs):
                result = save(*args, **kwargs)
                self._stay()
                return result

            tokenizer.save_pretrained = save_and_stay
            try:
                save_components(*args, tokenizer=tokenizer, **kwargs)
            finally:
                del tokenizer.save_pretrained

        run_folder.save_components = slow

    def _in_a_sample(self) -> None:
        from latte_flow.training.objectives.flow_matching import FlowMatchingSamples

        get = FlowMatchingSamples.__getitem__

        def slow(samples, index):
            if self._due(DATA) and index == self.watch.first_index:
                self._wait_for_the_step()  # a data worker is ahead of the training
                self._stay()
            return get(samples, index)

        FlowMatchingSamples.__getitem__ = slow

    def _in_the_grid(self) -> None:
        from latte_flow.training.monitor import sample_grid

        sample_latents = sample_grid.sample_latents

        def slow(*args, **kwargs):
            if self._due(GRID, self.step):
                self._stay()
            return sample_latents(*args, **kwargs)

        sample_grid.sample_latents = slow

    def _in_a_read(self) -> None:
        import torch

        load = torch.load

        def slow(f, *args, **kwargs):
            result = load(f, *args, **kwargs)
            if self._due(RESUME) and saved_step(f):
                self._stay()
            return result

        torch.load = slow

    def _in_a_write(self) -> None:
        import torch

        save = torch.save

        def slow(obj, f, *args, **kwargs):
            step = saved_step(f)
            if self._due(NO_SHARD, step):
                self._stay()
            if not (
                self._due(HALF_SHARD, step) and self.rank == self.watch.rank and str(f).endswith("optim_states.pt")
            ):
                return save(obj, f, *args, **kwargs)
            content = io.BytesIO()
            save(obj, content, *args, **kwargs)
            content = content.getvalue()
            with open(f, "wb") as stream:
                stream.write(content[: len(content) // 2])
                stream.flush()
                self._stay()
                stream.write(content[len(content) // 2 :])
            return None

        torch.save = slow

    def _in_a_sync(self) -> None:
        fsync = os.fsync

        def slow(descriptor):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            step = saved_step(path)
            if path.suffix == ".pt" and self._due(HASHING, step):
                self._stay()
            if path.name == "manifest.json" and self._due(HALF_MANIFEST, step):
                content = path.read_bytes()
                os.ftruncate(descriptor, len(content) // 2)
                self._stay()
                os.pwrite(descriptor, content, 0)
            return fsync(descriptor)

        os.fsync = slow

    def _in_a_rename(self) -> None:
        replace = os.replace

        def slow(source, target, **kwargs):
            if self._due(RENAME, saved_step(target)):
                self._stay()
            if Path(target).name == "latest" and self._due(LATEST, named_step(source)):
                self._stay()
            return replace(source, target, **kwargs)

        os.replace = slow

    def _in_a_removal(self) -> None:
        rmtree = shutil.rmtree

        def slow(path, *args, **kwargs):
            path = Path(path)
            older = re.fullmatch(r"step_\d+", path.name) and path.is_dir() and (path.parent / "latest").is_file()
            if older and self._due(REMOVAL, named_step(path.parent / "latest")):
                files = sorted(file for file in path.iterdir() if file.is_file())
                for file in files[: (len(files) + 1) // 2]:
                    file.unlink()
                self._stay()
            return rmtree(path, *args, **kwargs)

        shutil.rmtree = slow


def named_step(latest) -> int:
    """Return the step that a file ``latest`` names."""
    return int(Path(latest).read_text().removeprefix("step_"))


def saved_step(path) -> int:
    """Return which step's checkpoint a path names or lies in, committed or not; 0 when none's, or when it is no path."""
    if not isinstance(path, str | os.PathLike):
        path = getattr(path, "name", "")
    found = re.search(r"checkpoints/step_(\d+)", str(path))
    return int(found.group(1)) if found else 0


if __name__ == "__main__":
    moments = Moments(Watch(**json.loads(os.environ[VARIABLE])))
    moments.announce("start")
    moments.install()
    sys.argv[0] = str(Path(__file__).resolve().parents[2] / "training" / "main.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
