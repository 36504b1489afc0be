"""Golden losses: what tiny runs trained before a change of the code, to hold the code after it to.

    OMP_NUM_THREADS=1 python -m tests.golden.record [NAME ...] [--output DIR]            # record
    OMP_NUM_THREADS=1 python -m tests.golden.record [NAME ...] [--output DIR] --compare  # train again and compare

NAME is one of runs.RUNS (default: all). DIR holds a JSON file a run (default: this folder, which test_golden.py reads).

A change that must not change numbers: record with --output on the machine at hand before it, compare after it. --compare prints
for each run whether it is bit-identical, and otherwise the largest relative difference and where it is; it exits 1 when one is
beyond the tolerance (TOLERANCES).

A change that is meant to change numbers: record into this folder again and commit the files with it; their diff shows which runs
it concerns, and its message says why they differ.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch

from tests.golden.runs import LAG, RUNS, record
from tests.integration.conftest import CommandLines
from tests.integration.launching import server_environment

FOLDER = Path(__file__).parent
TOLERANCES = {"fp32": 2e-4, "bf16": 5e-2}
"""Largest relative difference that is rounding: ten times what was measured between torch's, oneDNN's and MKL's AVX-512 and SSE
kernels on one CPU, 2e-5 and 5e-3. In float32 a wrong sign of the gates differs by 4e-2, a decay of the average that is one update
late by 2e-2; timesteps of other samples differ in their hash too."""


def tolerance(run: dict) -> float:
    """Return the tolerance that holds for a record's ``run``."""
    return TOLERANCES[run["fields"].get("precision", "fp32")]


def differences(new: dict, recorded: dict) -> dict[str, float]:
    """Return by how much the numbers of two records differ: where -> relative difference, infinite for what must be equal.

    Three scales are not the recorded number itself, which may happen to be near zero. Gradient norms: 0.01 at least, as their
    rounding is that of the gradients of single samples. A component of weights: their norm. What the average lags behind:
    a twentieth of the weights' norm at least.
    """
    found = {} if new["run"] == recorded["run"] else {"run": float("inf")}
    for mine, theirs in zip(new["steps"], recorded["steps"], strict=True):
        for name in theirs | mine:
            scale = max(abs(theirs[name]), 0.01) if name in theirs and name not in ("step", "trained") else 0.0
            found[f"step {theirs['step']}, {name}"] = _relative(mine.get(name), theirs.get(name), scale)
    for kind, expected in recorded["weights"].items():
        for part in expected | new["weights"][kind]:
            mine, theirs = (weights.get(part, [None, None]) for weights in (new["weights"][kind], expected))
            scale = theirs[0] or 0.0
            if kind == LAG and part in expected:
                scale = max(scale, recorded["weights"]["model"][part][0] / 20)
            for name, ours, reference in zip(("norm", "component"), mine, theirs, strict=True):
                found[f"{kind}, {part}, {name}"] = _relative(ours, reference, scale)
    return found


def _relative(new, recorded, scale: float) -> float:
    if new == recorded:
        return 0.0
    return abs(new - recorded) / scale if scale and new is not None else float("inf")


def beyond(found: dict[str, float], tolerance: float) -> list[str]:
    """Return the lines of ``differences`` beyond a tolerance, in the order of training."""
    return [f"{where}: differs by {value:.2g}" for where, value in found.items() if not value <= tolerance]


def read(folder: Path, name: str) -> dict:
    """Read a run's record."""
    return json.loads((folder / f"{name}.json").read_text())


def write(folder: Path, name: str, entry: dict) -> None:
    """Write a run's record, a step or a parameter a line."""
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    steps = ",\n".join(f"  {json.dumps(step)}" for step in entry["steps"])
    kinds = []
    for kind, parts in entry["weights"].items():
        lines = ",\n".join(f"   {json.dumps(part)}: {json.dumps(numbers)}" for part, numbers in parts.items())
        kinds.append(f"  {json.dumps(kind)}: {{\n{lines}\n  }}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(
        f'{{\n "recorded_with": {json.dumps(versions)},\n "run": {json.dumps(entry["run"])},\n'
        f' "steps": [\n{steps}\n ],\n "weights": {{\n' + ",\n".join(kinds) + "\n }\n}\n"
    )


def main() -> int:
    """Record or compare; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.record", description="Record golden losses.")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"default: all of {', '.join(RUNS)}")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="folder of the records")
    parser.add_argument("--compare", action="store_true", help="write nothing; compare with the records of DIR")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - RUNS.keys()
    if unknown:
        parser.error(f"NAME: {', '.join(sorted(unknown))} unknown; accepted: {', '.join(RUNS)}")
    folder, failed = arguments.output.resolve(), False
    with server_environment(), tempfile.TemporaryDirectory() as temporary:
        command = CommandLines(Path(temporary))
        for name in arguments.names or RUNS:
            tools_folder = Path(temporary) / name
            tools_folder.mkdir()
            entry = record(command, name, tools_folder)
            if not arguments.compare:
                write(folder, name, entry)
                print(f"{name}: recorded", flush=True)
                continue
            found = differences(entry, read(folder, name))
            where, largest = max(found.items(), key=lambda item: item[1])
            lines = beyond(found, tolerance(entry["run"]))
            print(f"{name}: " + (f"largest difference {largest:.2g} ({where})" if largest else "bit-identical"))
            print("".join(f"  {line}\n" for line in lines), end="", flush=True)
            failed = failed or bool(lines)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
