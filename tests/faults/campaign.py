"""Runs the cases of a plan: start, wait for the moment, do the fault, look at what is left, start again, compare the end.

Promises that are checked, each broken one a sentence in the result's ``problems``:

- a start resumes from the newest checkpoint that is valid by an independent check, never from a torn or damaged one;
- the processes that a kill has spared end by themselves;
- a signal or the stop file leads to a checkpoint, exit code 75 and the marker ``requeue``; a second signal ends the run at once;
- the same command, started again, ends with 0, and then weights, averaged weights, losses, gradient norms and sample grids equal
  those of a run that nothing has disturbed, bit for bit.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from latte_flow.training.configs.parser import parse_config
from tests.faults.inspection import (
    VALID,
    checkpoint_states,
    compare,
    damage,
    left_behind,
    metrics,
    newest_valid,
    resumed_from,
    step_of,
)  # fmt: skip
from tests.faults.launches import (
    POLL_SECONDS,
    Launch,
    Starter,
    kill_group,
    members,
    send,
    wait_for_end,
    with_descendants,
)
from tests.faults.moments import ANYWHERE, DATA, LAUNCH, Watch, read_events
from tests.faults.plan import (
    ALL_RANKS,
    INT,
    KILL_SECONDS,
    LAUNCHER,
    LEAVES,
    ONE_RANK,
    RANKS,
    STOP_FILE,
    STOPS,
    TERM,
    TERM_TWICE,
    VICTIMS,
    Case,
    Fault,
    Schedule,
)  # fmt: skip

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
PLAIN, WATCHED = "training/main.py", "tests/faults/moments.py"
EXIT_STOPPED, STOP_MARK, REQUEUE_MARK = 75, "stop", "requeue"
"""What is documented of a run that is asked to stop. Not imported: a change of the product's must be noticed."""
REPEAT_SECONDS = 2.5
"""A signal that comes again after this time is a second request."""
LIMIT = 600.0
"""Seconds after which a start, or what a fault has left of it, counts as hanging."""
ATTEMPTS = 3
"""How often a case is tried whose fault came too late for its moment, on a machine that was busy with something else."""


def training_arguments(fields: dict | None = None) -> list[str]:
    """Return the training arguments of all runs of a campaign: TRAINING, with some fields changed or added."""
    return [text for name, value in (TRAINING | (fields or {})).items() for text in (f"--{name}", str(value))]


@dataclass
class Start:
    """What happened to one start of a run.

    Attributes:
        fault: what was done to it; None for the start that is left to finish.
        before: the states of the checkpoints at its beginning (inspection.py).
        resumed_from: the checkpoint that it says it went on from.
        exit_code: the launcher's; None when it never ended.
        seconds: from the fault to the end of all processes.
        damaged: what was damaged after the fault.
        after: the states of the checkpoints then.
        stopped_at: step of the newest valid checkpoint then.
        requeue: whether the run had left its marker.
    """

    fault: Fault | None
    before: dict[str, str]
    resumed_from: str | None = None
    exit_code: int | None = None
    seconds: float = 0.0
    damaged: str = ""
    after: dict[str, str] = field(default_factory=dict)
    stopped_at: int | None = None
    requeue: bool = False


@dataclass
class Result:
    """What happened to a case.

    Attributes:
        case: what was planned.
        starts: what was met, for each start.
        equal: what of the finished run equals the undisturbed one's.
        left_behind: what lies in its checkpoints folder, and not in the other's.
        problems: broken promises; none: the case has passed.
        missed: whether a fault came when its moment was already over.
        seconds: of everything.
    """

    case: Case
    starts: list[Start] = field(default_factory=list)
    equal: dict[str, bool] = field(default_factory=dict)
    left_behind: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missed: bool = False
    seconds: float = 0.0


class Campaign:
    """The runs of a plan, all with the same arguments, and the undisturbed run that they are compared with.

    Args:
        start: starts the ranks.
        arguments: of training/main.py, without output_dir and data.num_workers.
        output: folder for everything; logs stay, what a run trained is kept where a promise was broken.
        report: JSON Lines, one Result a case, in the order in which they were run; None: report.jsonl in the folder.

    Raises:
        ValueError: when the arguments leave no room for faults.
    """

    def __init__(self, *, start: Starter, arguments: Sequence[str], output: Path, report: Path | None = None):
        self.start, self.arguments, self.output = start, list(arguments), output
        self.schedule = Schedule.of(parse_config(self.arguments))
        self.reference, self.report = output / "reference", report or output / "report.jsonl"
        self._launches: list[Launch] = []
        self._results: dict[Case, Result] = {}

    def close(self) -> None:
        """End what is still running, when the campaign itself is interrupted."""
        for launch in self._launches:
            kill_group(launch)

    @cached_property
    def pace(self) -> dict[str, float]:
        """Seconds from the start of the undisturbed run to its first step, and from one checkpoint to the next."""
        log, events = self.output / "reference.log", self.output / "reference.events"
        launch = self._launch(WATCHED, self.reference, log, Watch(str(events)))
        times = []
        for event, count in (("start", RANKS), ("train", 1), ("train", RANKS * self.schedule.max_steps)):
            self._wait(
                launch, events, lambda seen, event=event, count=count: [e["event"] for e in seen].count(event) >= count
            )
            times.append(time.monotonic())
        assert wait_for_end(launch, LIMIT) and launch.poll() == 0, f"the undisturbed run failed: see {log}"  # noqa: PT018
        return {LAUNCH: times[1] - times[0], ANYWHERE: (times[2] - times[1]) / self.schedule.intervals}

    def run(self, case: Case) -> Result:
        """Run a case, again where a fault came too late, and add its result to the report; a case is run once."""
        if case not in self._results:
            self._results[case] = result = self._attempts(case, self.output / case.name)
            with self.report.open("a") as stream:
                stream.write(json.dumps(asdict(result)) + "\n")
        return self._results[case]

    def _attempts(self, case: Case, folder: Path) -> Result:
        _ = self.pace
        for _ in range(ATTEMPTS):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            begin = time.monotonic()
            result = self._run(case, folder)
            result.seconds = time.monotonic() - begin
            if result.problems or not result.missed:
                break
        if result.missed and not result.problems:
            result.problems.append(f"no fault was put into its moment in {ATTEMPTS} attempts: nothing is shown")
        if not result.problems:
            shutil.rmtree(folder / "run")
        return result

    def _run(self, case: Case, folder: Path) -> Result:
        result, run = Result(case), folder / "run"
        for number, fault in enumerate((*case.faults, None)):
            start = Start(fault, before=checkpoint_states(run))
            result.starts.append(start)
            log, events = folder / f"start_{number}.log", folder / f"start_{number}.events"
            if fault:
                index = (fault.step - 1) * self.schedule.batch
                watch = Watch(str(events), fault.moment, fault.step, fault.seconds, fault.rank, first_index=index)
                launch = self._launch(WATCHED, run, log, watch, workers=fault.workers)
                self._suffer(fault, launch, run, events, start, result)
            else:
                launch = self._launch(PLAIN, run, log)
                if not wait_for_end(launch, LIMIT):
                    result.problems.append(f"start {number} hung for {LIMIT:.0f} s")
                start.exit_code = launch.poll()
                if start.exit_code != 0:
                    result.problems.append(f"start {number}, left to finish, ended with {start.exit_code}: see {log}")
            start.after = checkpoint_states(run)
            newest = newest_valid(start.after)
            start.stopped_at = newest and step_of(newest)
            start.requeue = (run / REQUEUE_MARK).exists()
            self._check_resume(start, log, events, number, result)
            if fault and not result.missed:
                if fault.action not in VICTIMS:
                    _check_signal(start, run, read_events(events), result)
                elif start.exit_code == 0 and fault.action != LAUNCHER:
                    result.problems.append(
                        f"start {number}: the launcher ended with 0 after {fault.action} had been killed"
                    )
                self._damage(fault, run, start)
            if result.problems or result.missed:
                return result
        self._check_end(result, run)
        return result

    def _check_end(self, result: Result, run: Path) -> None:
        result.equal = compare(run, self.reference, self.schedule.max_steps)
        result.problems += [
            f"{name} differ from the undisturbed run's" for name, equal in result.equal.items() if not equal
        ]
        if result.starts[-1].requeue:
            result.problems.append("the finished run still asks to be requeued")
        result.left_behind = left_behind(run, self.reference)
        if not any(stopped_between(start, self.schedule.save_every) for start in result.starts):
            result.problems += [f"left behind: {name}" for name in result.left_behind]

    def _launch(self, script: str, run: Path, log: Path, watch: Watch | None = None, workers: int = 0) -> Launch:
        arguments = [*self.arguments, "--data.num_workers", str(workers), "--output_dir", str(run)]
        launch = self.start(script, arguments, log, watch.variables() if watch else {})
        self._launches = [other for other in self._launches if members(other.pid)] + [launch]
        return launch

    def _wait(self, launch: Launch, events: Path, happened: Callable[[list[dict]], bool]) -> bool:
        """Wait for events; return False when the launch ended before them, or hung."""
        end = time.monotonic() + LIMIT
        while not happened(read_events(events)):
            if launch.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _suffer(self, fault: Fault, launch: Launch, run: Path, events: Path, start: Start, result: Result) -> None:
        """Put a fault into a launch and wait until nothing of the launch is left."""

        def inside(seen: list[dict]) -> bool:
            begun = [e for e in seen if e["event"] == "start"]
            trains = any(e["event"] == "train" and e["step"] == fault.step for e in seen)
            if fault.moment == LAUNCH:
                return len(begun) == RANKS
            if fault.moment == ANYWHERE:
                return trains
            return any(e["event"] == "inside" for e in seen) and (trains or fault.moment != DATA)

        if not self._wait(launch, events, inside):
            kill_group(launch)
            start.exit_code = launch.poll()
            # After a fault whose victims trained on for longer than planned, this one's moment may lie in the past.
            result.missed = start.exit_code == 0
            if not result.missed:
                ended = f"the start ended before, with {start.exit_code}: see {events.with_suffix('.log')}"
                result.problems.append(f"{fault.moment}, step {fault.step}: {ended}")
            return
        time.sleep(0.7 * fault.fraction * self.pace.get(fault.moment, min(fault.seconds, KILL_SECONDS)))
        over = "train" if fault.moment == LAUNCH else "past"
        result.missed = launch.poll() is not None or any(e["event"] == over for e in read_events(events))
        if result.missed:
            kill_group(launch)
            return
        ranks = {e["rank"]: e["pid"] for e in read_events(events) if e["event"] == "start"}
        at = time.monotonic()
        _do(fault, launch, ranks, run)
        if fault.action == LAUNCHER:
            self._start_beside(launch, run, events.with_suffix(".beside.log"), result)
        if not wait_for_end(launch, LIMIT):
            result.problems.append(
                f"after {fault.action}, {fault.moment}: processes were left that hung for {LIMIT:.0f} s"
            )
        start.seconds = time.monotonic() - at
        start.exit_code = launch.poll()

    def _start_beside(self, orphans: Launch, run: Path, log: Path, result: Result) -> None:
        """Give the same command at once, and again as long as ranks live on without their launcher: it may not train beside them.

        Nobody ends the ranks. The start that outlives them is killed.
        """
        end = time.monotonic() + LIMIT
        while members(orphans.pid) and time.monotonic() < end:
            second = self._launch(PLAIN, run, log)
            while members(orphans.pid) and second.poll() is None and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
            if second.poll() == 0:
                result.problems.append(f"a second start ended with 0 beside ranks without a launcher: see {log}")
            kill_group(second)

    @staticmethod
    def _check_resume(start: Start, log: Path, events: Path, number: int, result: Result) -> None:
        start.resumed_from = resumed_from(log)
        trained = start.fault is None or any(e["event"] == "train" for e in read_events(events))
        newest = newest_valid(start.before)
        if start.resumed_from != newest and (trained or start.resumed_from):
            state = start.before.get(start.resumed_from, "does not exist") if start.resumed_from else "nothing"
            result.problems.append(
                f"start {number} went on from {start.resumed_from} ({state}); the newest valid one was {newest}"
            )

    @staticmethod
    def _damage(fault: Fault, run: Path, start: Start) -> None:
        valid = [name for name, state in start.after.items() if state == VALID]
        if fault.damage and len(valid) > 1:
            newest = newest_valid(start.after)
            start.damaged = (
                f"{newest}/{damage(run / 'checkpoints' / newest, fault.damage, fault.damaged_file)} {fault.damage}"
            )


def stopped_between(start: Start, save_every: int) -> bool:
    """Return whether a start was asked to stop and left a checkpoint of a step between two saves, which is kept like others.

    Ranks that live on are asked by the end of their launcher.
    """
    asked = start.fault is not None and start.fault.action not in (ONE_RANK, ALL_RANKS)
    return asked and start.stopped_at is not None and start.stopped_at % save_every != 0


def _do(fault: Fault, launch: Launch, ranks: dict[int, int], run: Path) -> None:
    """Do a fault to the ranks, rank -> process id."""
    everyone = list(ranks.values())
    if fault.action == ONE_RANK:
        send([ranks[fault.rank]], signal.SIGKILL)
    elif fault.action == ALL_RANKS:
        send(everyone, signal.SIGKILL)
    elif fault.action == LAUNCHER:
        send([launch.pid], signal.SIGKILL)
    elif fault.action == STOP_FILE:
        (run / STOP_MARK).touch()
    elif fault.action in STOPS:
        # A rank whose shard is half written is not the one that is signalled: it learns of it from the other.
        receivers = with_descendants(everyone) if fault.action in (TERM, INT) else [ranks[max(ranks)]]
        send(receivers, _number(fault))
    else:
        send(everyone, _number(fault))
        time.sleep(REPEAT_SECONDS)
        send(everyone, _number(fault))


def _number(fault: Fault) -> int:
    return {TERM: signal.SIGTERM, TERM_TWICE: signal.SIGTERM, INT: signal.SIGINT}.get(fault.action, signal.SIGUSR1)


def _check_signal(start: Start, run: Path, events: list[dict], result: Result) -> None:
    fault, say = start.fault, result.problems.append
    what = f"{fault.action}, {fault.moment}, step {fault.step}"
    if fault.action in LEAVES:
        ranks = {e["pid"] for e in events if e["event"] == "start"}  # a data worker ends when its batch is done
        if any(
            (e["event"] == "past" and e["pid"] in ranks) or (e["event"] == "train" and e["step"] > fault.step)
            for e in events
        ):
            say(f"{what}: the run went on")
        if start.exit_code != 128 + _number(fault):
            say(f"{what}: exit code {start.exit_code} instead of {128 + _number(fault)}")
        if start.requeue:
            say(f"{what}: left at once, and asks to be requeued")
        return
    # A save and a grid belong to a step that is trained; a GPU's ranks hear of a stop one step later.
    first = fault.step + (fault.moment.startswith("save"))
    if start.stopped_at not in (first, first + 1):
        say(f"{what}: the newest valid checkpoint is of step {start.stopped_at} instead of {first}")
    elif metrics(run)[-1]["step"] != start.stopped_at:
        say(f"{what}: steps after the checkpoint of step {start.stopped_at} were trained")
    if start.exit_code != EXIT_STOPPED:
        say(f"{what}: exit code {start.exit_code} instead of {EXIT_STOPPED}")
    if not start.requeue:
        say(f"{what}: no file {REQUEUE_MARK}")
    if (run / STOP_MARK).exists():
        say(f"{what}: the stop file is still there, and would stop the next start")
