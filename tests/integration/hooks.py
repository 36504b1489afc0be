"""What tests put into a training process before it starts, to see what it does or to end it; the product's code is unchanged.

Each hook runs in every rank. HOOK_DIR is where it leaves what it has seen.
"""

import errno
import json
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from latte_flow.training import run_folder, trainer
from latte_flow.training.checkpoint import opening
from latte_flow.training.checkpoint.model_folder import VLM_FOLDER
from latte_flow.training.objectives.flow_matching import FlowMatching
from latte_flow.training.trainer import Trainer
from tests.unit.test_extending import example


def record_batches() -> None:
    """Save every micro-batch that is trained, its step and its losses, as rank_R.pt: a list of dicts."""
    compute_losses, train_step, seen, step = FlowMatching.compute_losses, Trainer.train_step, [], 0

    def recording(self, engine, batch):
        losses = compute_losses(self, engine, batch)
        fields = {name: value for name, value in vars(batch).items() if value is not None}
        seen.append({"step": step, "losses": losses.detach(), **fields})
        torch.save(seen, Path(os.environ["HOOK_DIR"]) / f"rank_{os.environ['RANK']}.pt")
        return losses

    def counting(self, *args, **kwargs):
        nonlocal step
        step = self.step + 1
        return train_step(self, *args, **kwargs)

    FlowMatching.compute_losses, Trainer.train_step = recording, counting


def watch_vlm() -> None:
    """Save the weights of the VLM that the run reads, before and after training, as vlm_before.pt and vlm_after.pt."""
    build_components, train, kept = trainer.build_components, Trainer.train, {}

    def save(name):
        torch.save(kept["vlm"].state_dict(), Path(os.environ["HOOK_DIR"]) / name)

    def building(*args, **kwargs):
        components = build_components(*args, **kwargs)
        kept["vlm"] = components[0]
        save("vlm_before.pt")
        return components

    def training(self):
        finished = train(self)
        save("vlm_after.pt")
        return finished

    trainer.build_components, Trainer.train = building, training


def die_after_step() -> None:
    """End every rank at once, as a power failure would, when the step DIE_AFTER_STEP is trained and before it is logged."""
    train_step = Trainer.train_step

    def dying(self, *args, **kwargs):
        norms = train_step(self, *args, **kwargs)
        if self.step >= int(os.environ["DIE_AFTER_STEP"]):
            os._exit(9)
        return norms

    Trainer.train_step = dying


def die_while_starting() -> None:
    """End every rank at once when the first files of the output_dir are written and the model folder is not complete."""

    def dying(folder, *args, **kwargs):
        (folder / VLM_FOLDER).mkdir(parents=True)
        os._exit(9)

    run_folder.save_components = dying


def measure_memory() -> None:
    """Save the bytes that a rank holds after each step, by label of the dry run, as memory_R.json."""
    train_step = Trainer.train_step

    def measuring(self, *args, **kwargs):
        norms = train_step(self, *args, **kwargs)
        optimizer = self.engine.optimizer
        states = [t for state in optimizer.optimizer.state.values() for t in state.values() if t.numel() > 1]
        held = {
            "weights": sum(p.nbytes for p in self.model.parameters()),
            "optimizer (master weights, moments, average)": sum(
                t.nbytes for t in (*optimizer.single_partition_of_fp32_groups, *states)
            ),
            "context cache": self.objectives.parts["flow_matching"].contexts.context.num_bytes,
        }
        (Path(os.environ["HOOK_DIR"]) / f"memory_{self.rank}.json").write_text(json.dumps(held))
        return norms

    Trainer.train_step = measuring


def fail_a_write() -> None:
    """Let the write of one file fail as on a full disk: FAIL_WRITE names its rank and its step, "1 4"."""
    rank, step = map(int, os.environ["FAIL_WRITE"].split())
    write = torch.save

    def failing(obj, f, *args, **kwargs):
        if f"step_{step:07d}" in str(f) and os.environ["RANK"] == str(rank):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(f))
        return write(obj, f, *args, **kwargs)

    torch.save = failing


def break_logs() -> None:
    """Fill a disk after a step and free it after a later one; from the first on, standard output is full and printed to.

    BREAK_LOGS holds both steps and the disk, "5 7 /disk".
    """
    train_step = Trainer.train_step
    first, last, disk = os.environ["BREAK_LOGS"].split(" ", 2)
    filler = Path(disk) / "filler"

    def breaking(self, *args, **kwargs):
        norms = train_step(self, *args, **kwargs)
        if self.step == int(first):
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
            with suppress(OSError), filler.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(4096))
        if self.step == int(last):
            filler.unlink()
        print(f"step {self.step}", flush=True)
        return norms

    Trainer.train_step = breaking


def remove_while_read() -> None:
    """Remove the checkpoint that rank 1 is about to read, once, after another took its place: REMOVE holds both, "/old /new"."""
    old, new = map(Path, os.environ["REMOVE"].split(" ", 1))
    read = opening.read_weights

    def reading(path, which):
        if os.environ["RANK"] == "1" and new.exists():
            new.rename(old.parent / new.name)
            shutil.rmtree(old)
        return read(path, which)

    opening.read_weights = reading


def dump_state() -> None:
    """Save what every rank together holds before the first step, by DeepSpeed's own functions, as state.pt of rank 0."""
    train = Trainer.train

    def dumping(self):
        keys = ("exp_avg", "exp_avg_sq", "ema")
        # Stages 1 and 2, else at the first step.
        if hasattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        held = {
            name: {None: safe_get_full_fp32_param(p)} | {key: safe_get_full_optimizer_state(p, key) for key in keys}
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        updates = {float(state["step"]) for state in self.engine.optimizer.optimizer.state.values()}
        counters = {name: getattr(self.engine, name) for name in ("global_steps", "global_samples", "skipped_steps")}
        if self.rank == 0:
            torch.save(
                {"held": held, "updates": updates, "counters": counters}, Path(os.environ["HOOK_DIR"]) / "state.pt"
            )
        return train(self)

    Trainer.train = dumping


def poison() -> None:
    """Make the losses of some samples not finite: POISON holds first and last global indices, "70 71 230 230"."""
    numbers = list(map(int, os.environ["POISON"].split()))
    compute_losses = FlowMatching.compute_losses

    def poisoned(self, engine, batch):
        hit = torch.zeros_like(batch.sample_indices, dtype=torch.bool)
        for first, last in zip(numbers[::2], numbers[1::2], strict=True):
            hit |= (batch.sample_indices >= first) & (batch.sample_indices <= last)
        return compute_losses(self, engine, batch) * torch.where(hit, torch.nan, 1.0)

    FlowMatching.compute_losses = poisoned


def hang_in_step() -> None:
    """Let one rank wait for data forever: HANG holds its rank and the step, "1 3"."""
    rank, step = map(int, os.environ["HANG"].split())
    train_step = Trainer.train_step

    def wait_for_ever():
        time.sleep(3600)
        yield

    def hanging(self, batches, **kwargs):
        return train_step(self, wait_for_ever() if (self.rank, self.step + 1) == (rank, step) else batches, **kwargs)

    Trainer.train_step = hanging


def write_after_later_steps() -> None:
    """Hold back the write of step 4's files until two more steps are trained: forever, if training waits for the write."""
    write, train_step, trained = torch.save, Trainer.train_step, threading.Event()

    def waiting(obj, f, *args, **kwargs):
        if "step_0000004" in str(f):
            assert trained.wait(120), "training waits for the write"
        return write(obj, f, *args, **kwargs)

    def telling(self, *args, **kwargs):
        norms = train_step(self, *args, **kwargs)
        if self.step == 6:
            trained.set()
        return norms

    torch.save, Trainer.train_step = waiting, telling


def cut_off_a_file() -> None:
    """Cut a file of the data off at its start, and leave it there, after a step: CUT_OFF names both, "2 /path"."""
    train_step = Trainer.train_step
    step, file = os.environ["CUT_OFF"].split(" ", 1)

    def cutting(self, *args, **kwargs):
        norms = train_step(self, *args, **kwargs)
        if self.step == int(step):
            os.truncate(file, 1024)
        return norms

    Trainer.train_step = cutting


def add_an_objective() -> None:
    """Register the objective ``unit_scale`` of docs/extending.md, as a script that imports it does."""
    exec(example("Objective"), {"__name__": "example"})
