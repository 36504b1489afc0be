"""Put faults into real training runs and see that nothing is lost.

    python tools/fault_campaign.py kill --output DIR [--runs 60] [--seed 0] [--ranks 2] [-- training arguments]
    python tools/fault_campaign.py signals --output DIR [--ranks 2] [-- training arguments]

``kill`` kills one rank, all ranks or the launcher with SIGKILL at random moments: while starting, in a step, in every part of a
save, while drawing the grid, while resuming; after some kills a file of the newest checkpoint is damaged, too. ``signals`` sends
each signal, and writes the stop file, in each moment of a run. After each the same command goes on, and the run must end with the
weights, losses and sample grids of one that nothing disturbed. Everything that is drawn depends on the seed and the run's number
alone: ``--only 17`` repeats one run. The same command again goes on where it was interrupted.

The ranks are started by the real ``deepspeed`` launcher (on a CPU set DS_ACCELERATOR=cpu). Writes report.json and report.md to
DIR, with a folder run_NNN of logs for each run; what a run trained is kept where a promise was broken. Ends with 1 in that case.
"""

import argparse
import json
import os
import platform
import signal
import sys
from importlib.metadata import version
from pathlib import Path

from latte_flow.tools.faults.campaign import Campaign, Result
from latte_flow.tools.faults.launches import DeepSpeedStarter, choose_port
from latte_flow.tools.faults.plan import Case, Schedule, kill_cases, signal_cases
from latte_flow.tools.faults.tables import kill_table, one_line, signal_table
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.errors import UserError, exit_code

TRAINING = {
    "deepspeed": "ds_configs/zero2.json",
    "max_steps": 12,
    "global_batch_size": 64,
    "optimizer.warmup_steps": 4,
    "checkpoint.every": 3,
    "checkpoint.keep_last": 2,
    "logging.every": 1,
    "sample.every": 3,
    "sample.num_images": 20,
    "sample.num_steps": 8,
}
"""The digits preset, cut short: twelve steps, four checkpoints of which two are kept, four grids."""
OWN = ("output_dir", "data.num_workers", "config", "dry_run")
PLAN_FILE = "campaign.json"


def training_arguments(extra: list[str]) -> list[str]:
    """Return the training arguments of all runs: TRAINING, then what the command line adds.

    Raises:
        UserError: for what the campaign sets itself.
    """
    for text in extra:
        name = text.removeprefix("--").split("=")[0]
        if text.startswith("--") and name in OWN:
            raise UserError(
                f"{name}: is set by the campaign, or not possible in it; accepted: other training arguments"
            )
    return [text for name, value in TRAINING.items() for text in (f"--{name}", str(value))] + extra


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what follows ``--`` is training arguments."""
    parser = argparse.ArgumentParser(
        prog="tools/fault_campaign.py", description="Put faults into real training runs and see that nothing is lost."
    )
    parser.add_argument("what", choices=("kill", "signals"))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new, empty, or this campaign's")
    parser.add_argument("--runs", type=int, default=60, help="of kill; default: 60")
    parser.add_argument("--kills_per_run", type=int, default=1, help="of kill; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of kill; default: 0")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--only", type=int, metavar="N", help="run this one (again)")
    return parser


def read_command(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the parsed command line and the training arguments of all runs.

    Raises:
        UserError: for a value out of range.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = make_parser().parse_args(argv[:cut])
    for name in ("runs", "kills_per_run", "ranks"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name}: got {getattr(arguments, name)}; accepted: 1 or more")
    return arguments, training_arguments(argv[cut + 1 :])


def plan(arguments: argparse.Namespace, schedule: Schedule) -> list[Case]:
    """Return the cases that the command line asks for.

    Raises:
        UserError: when ``only`` names none of them.
    """
    if arguments.what == "signals":
        cases = signal_cases(schedule, ranks=arguments.ranks)
    else:
        cases = kill_cases(
            schedule,
            seed=arguments.seed,
            runs=arguments.runs,
            kills_per_run=arguments.kills_per_run,
            ranks=arguments.ranks,
        )
    if arguments.only is not None and not 0 <= arguments.only < len(cases):
        raise UserError(f"only: got {arguments.only}; accepted: 0 to {len(cases) - 1}")
    return cases


def claim_folder(output: Path, plan_of: dict) -> None:
    """Make the folder of a campaign, or see that it is this one's.

    Raises:
        UserError: when it holds something else.
    """
    file = output / PLAN_FILE
    if file.is_file():
        if json.loads(file.read_text()) != plan_of:
            raise UserError(
                f"output: {output} holds another campaign; accepted: a new or empty folder, or the same command"
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output: {output} exists and is no campaign's; accepted: a new or empty folder")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plan_of, indent=1))


def earlier_result(output: Path, case: Case) -> Result | None:
    """Return the result of a case that an interrupted campaign has left; None when there is none."""
    file = output / f"run_{case.number:03d}" / "result.json"
    result = Result.from_json(file.read_text()) if file.exists() else None
    return result if result and result.case == case else None


def write_report(output: Path, plan_of: dict, results: list[Result]) -> str:
    """Write report.json and report.md; return the table."""
    table = (signal_table if plan_of["what"] == "signals" else kill_table)(results)
    (output / "report.md").write_text(table)
    report = {
        **plan_of,
        "machine": {"cpus": os.cpu_count(), "system": platform.system(), "processor": platform.machine()},
        "versions": {name: version(name) for name in ("torch", "deepspeed")} | {"python": platform.python_version()},
        "broken": sum(bool(result.problems) for result in results),
        "runs": [json.loads(result.to_json()) for result in results],
    }
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return table


def main() -> None:
    """Run what the command line asks for; print a line a run, then the table."""
    arguments, training = read_command(sys.argv[1:])
    schedule = Schedule.of(parse_config(training))
    cases = plan(arguments, schedule)
    plan_of = {name: getattr(arguments, name) for name in ("what", "runs", "kills_per_run", "seed", "ranks")}
    plan_of["training"] = training
    claim_folder(arguments.output, plan_of)
    output = arguments.output.resolve()
    start = DeepSpeedStarter(arguments.ranks, choose_port())
    campaign = Campaign(start=start, arguments=training, schedule=schedule, ranks=arguments.ranks, output=output)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # through the finally below
    results = []
    try:
        for case in cases:
            result = None if arguments.only == case.number else earlier_result(output, case)
            if result is None and arguments.only in (None, case.number):
                result = campaign.run(case)
                print(f"{case.number + 1}/{len(cases)} {one_line(result)}", flush=True)
            if result is not None:
                results.append(result)
                table = write_report(output, plan_of, results)
    finally:
        campaign.close()
        start.close()
    print(f"\n{table}")
    if any(result.problems for result in results):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(exit_code(main))
