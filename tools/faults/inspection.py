"""What lies in an output_dir after a fault, judged without the code that is being tested, and what a finished run must equal."""

import hashlib
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import torch

from latte_flow.training.checkpoint.opening import read_weights

VALID, PARTIAL = "valid", "partial"
COMPARED = re.compile(r"step|samples|lr|loss.*|grad_norm.*")
"""Columns of metrics.jsonl that do not depend on the time of day."""


def checkpoint_states(output_dir: Path) -> dict[str, str]:
    """Return for each folder of a step what it is: valid, partial (never renamed into place), or what is wrong with it.

    The documented layout is all that is relied upon: a checkpoint is a folder step_N whose manifest.json lists every file with
    its size and SHA-256.
    """
    states = {}
    for folder in sorted((output_dir / "checkpoints").glob("step_*")):
        states[folder.name] = manifest_problem(folder) if re.fullmatch(r"step_\d+", folder.name) else PARTIAL
    return states


def manifest_problem(folder: Path) -> str:
    """Return ``valid``, or the first thing that is wrong with a folder's manifest and files."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return "no manifest"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest: {error!r}"
    if not any(name.endswith("_optim_states.pt") for name in expected):
        return "manifest lists no optimizer shard"
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        content = file.read_bytes()
        if (len(content), hashlib.sha256(content).hexdigest()) != (size, digest):
            return f"{name} differs from the manifest"
    return VALID


def newest_valid(states: dict[str, str]) -> str | None:
    """Return the name of the newest valid checkpoint; None when there is none."""
    return max((name for name, state in states.items() if state == VALID), key=step_of, default=None)


def step_of(name: str) -> int:
    """Return the step of a checkpoint's folder."""
    return int(re.match(r"step_(\d+)", name).group(1))


def damage(folder: Path, kind: str, which: float) -> str:
    """Damage one file of a checkpoint (tools/faults/plan.py, DAMAGES) and return which; ``which``: 0 to 1 of the sorted files."""
    files = sorted(json.loads((folder / "manifest.json").read_text())["files"])
    file = folder / files[int(which * len(files))]
    content = bytearray(file.read_bytes())
    if kind == "lost":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    return file.name


def resumed_from(log: Path) -> str | None:
    """Return which checkpoint a start says that it went on from; None when it says nothing of the kind."""
    found = re.search(r"resumed from (\S+)", log.read_text(errors="replace"))
    return Path(found.group(1)).name if found else None


def metrics(output_dir: Path) -> list[dict]:
    """Return what a run has logged, without what depends on the time of day."""
    path = output_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in row.items() if COMPARED.fullmatch(name)} for row in rows]


def compare(output_dir: Path, reference: Path, last_step: int) -> dict[str, bool]:
    """Return whether a finished run equals the undisturbed one, bit for bit: its weights, what it logged, its sample grids."""
    name = f"step_{last_step:07d}"
    ours, theirs = (folder / "checkpoints" / name for folder in (output_dir, reference))
    grids = [
        {path.name: path.read_bytes() for path in (run / "samples").glob("*.png")} for run in (output_dir, reference)
    ]
    return {
        "weights": manifest_problem(ours) == VALID and all(_same_weights(ours, theirs, w) for w in ("model", "ema")),
        "metrics": metrics(output_dir) == metrics(reference),
        "grids": grids[0] == grids[1],
    }


def _same_weights(ours: Path, theirs: Path, which: str) -> bool:
    with redirect_stdout(io.StringIO()):  # DeepSpeed's reader prints
        mine, expected = read_weights(ours, which), read_weights(theirs, which)
    return mine.keys() == expected.keys() and all(torch.equal(mine[name], expected[name]) for name in expected)


def left_behind(output_dir: Path, reference: Path) -> list[str]:
    """Return what a finished run has in its checkpoints folder that the undisturbed one has not."""
    names = [{path.name for path in (run / "checkpoints").iterdir()} for run in (output_dir, reference)]
    latest = [(run / "checkpoints" / "latest").read_text() for run in (output_dir, reference)]
    return sorted(names[0] - names[1]) + ([f"latest: {latest[0]}"] if latest[0] != latest[1] else [])
