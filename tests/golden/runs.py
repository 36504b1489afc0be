"""The runs that are recorded, and what is recorded of one: see record.py."""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from latte_flow.training.checkpoint.opening import read_weights
from tests.integration.conftest import CommandLines, Run
from tests.integration.launching import metrics

STEPS = 8
COMMON = {
    "max_steps": STEPS,
    "checkpoint__every": STEPS,
    "sample__every": 0,
    # Large steps soon, so that the gates, which start at zero, have moved by the end.
    "optimizer__lr": 5e-3,
    "optimizer__warmup_steps": 2,
    # Reached at the fifth update: both branches of the average's decay are trained.
    "optimizer__ema_decay": 0.4,
}
LAG = "ema - model"
"""What the averaged weights lag behind: a wrong decay changes it by far more than the average itself."""
VANILLA = {"model__num_groups": 1, "model__residual_attention": "false"}


@dataclass(frozen=True)
class GoldenRun:
    """A run of the digits preset at the size of tests/integration/conftest.py's REDUCED.

    Args:
        ranks: number of processes.
        fields: of the configuration, over COMMON, with two underscores in place of a dot.
        latents: whether the digits are encoded by tools/encode_latents.py first.
        universal_at: the step at which the run is stopped, converted by tools/convert_checkpoint.py to deepspeed-universal, and
            resumed from that in a new output_dir; None: it is trained in one go.
    """

    ranks: int = 1
    fields: dict = field(default_factory=dict)
    latents: bool = False
    universal_at: int | None = None


RUNS = {
    "couple": GoldenRun(),
    "blend": GoldenRun(fields={"model__variant": "blend"}),
    "vanilla_couple": GoldenRun(fields=VANILLA),
    "vanilla_blend": GoldenRun(fields={"model__variant": "blend"} | VANILLA),
    "all_groups": GoldenRun(fields={"groups_per_sample": "all"}),
    "latents": GoldenRun(fields={"data__horizontal_flip": "true"}, latents=True),
    "bf16": GoldenRun(fields={"precision": "bf16"}),
    "zero2_2_ranks": GoldenRun(ranks=2),
    "tensor_parallel_2": GoldenRun(ranks=2, fields={"tensor_parallel": 2}),
    "universal_resume": GoldenRun(universal_at=4),
}


def record(command: CommandLines, name: str, folder: Path) -> dict:
    """Train one of RUNS and return its record, which JSON keeps exactly.

    Args:
        command: runs the command lines.
        name: of RUNS.
        folder: an empty one, for what the tools write.

    Returns:
        ``run``: how it was started. ``steps``: per step, the mean loss, that of each group, the gradient norms, and a hash of
        what was trained. ``weights``: per kind of weights, a summary of each parameter (``summarise``) after the last step.
    """
    golden = RUNS[name]
    fields = COMMON | golden.fields
    if golden.latents:
        fields |= {"data__dataset": "latents", "data__path": _encode_digits(command, folder / "latents")}
    runs = []
    if golden.universal_at is not None:
        until = {"max_steps": golden.universal_at, "checkpoint__every": golden.universal_at}
        runs.append(command.train(ranks=golden.ranks, hooks=("record_batches",), **fields | until))
        fields["resume"] = _convert_to_universal(command, runs[0].output_dir, folder / "universal")
    runs.append(command.train(ranks=golden.ranks, hooks=("record_batches",), **fields))
    trained = {step: hashed for run in runs for step, hashed in _hash_batches(run).items()}
    entries = [entry for run in runs for entry in metrics(run.output_dir)]
    checkpoint = runs[-1].checkpoint(STEPS)
    model, ema = (read_weights(checkpoint, which) for which in ("model", "ema"))
    return {
        "run": asdict(golden) | {"fields": COMMON | golden.fields},
        "steps": [_numbers(entry) | {"trained": trained[entry["step"]]} for entry in entries],
        "weights": {
            "model": summarise(model),
            "ema": summarise(ema),
            LAG: summarise({parameter: ema[parameter] - weight for parameter, weight in model.items()}),
        },
    }


def summarise(weights: dict[str, Tensor]) -> dict[str, list[float]]:
    """Summarise weights by two numbers a parameter, taken over all layers: the norm, and the component along a fixed direction.

    The direction, cos(0), cos(1), cos(2), ..., shows what the norm hides: a wrong sign or place. The gates start at zero, so a
    wrong sign of their use leaves every loss and norm as it is, and turns the weights' sign.
    """
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(weights):
        parts.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(weights[name].detach().double().flatten())
    summary = {}
    for name, tensors in parts.items():
        flat = torch.cat(tensors)
        direction = torch.arange(len(flat), dtype=torch.float64).cos()
        summary[name] = [float(flat.norm()), float(flat @ direction / direction.norm())]
    return summary


def _numbers(entry: dict) -> dict:
    """Return the numbers of a logged step that are compared."""
    compared = re.compile(r"step|loss|loss_group_\d+|grad_norm\w*")
    return {name: value for name, value in entry.items() if compared.fullmatch(name)}


def _hash_batches(run: Run) -> dict[int, str]:
    """Hash what a run has trained, per step: every rank's rows in their order.

    Integers and noise are hashed as they are: NumPy draws the same everywhere. Timesteps and pixels are float32 arithmetic and
    are rounded to 0.01 and 1/127 before.
    """
    hashes: dict[int, hashlib._Hash] = {}
    for file in sorted(run.hook_dir.glob("rank_*.pt")):
        for batch in torch.load(file, weights_only=False):
            data = batch["images"] if "images" in batch else batch["latents"].float()
            exact = [batch[name] for name in ("sample_indices", "groups", "image_rows", "context_rows", "noise")]
            rounded = [(batch["timesteps"] * 100).round().long(), (data * 127).round().long()]
            for values in exact + rounded:
                hashes.setdefault(batch["step"], hashlib.sha256()).update(values.numpy().tobytes())
    return {step: digest.hexdigest() for step, digest in hashes.items()}


def _encode_digits(command: CommandLines, folder: Path) -> Path:
    options = ["--source", "digits", "--codec", "pixel", "--resolution", "8", "--num_workers", "0", "--device", "cpu"]
    command.tool("tools/encode_latents.py", *options, "--output", str(folder))
    return folder


def _convert_to_universal(command: CommandLines, output_dir: Path, folder: Path) -> Path:
    command.tool("tools/convert_checkpoint.py", str(output_dir), str(folder), "--to", "deepspeed-universal")
    return folder
