"""Runs the cases of a plan: start, wait for the moment, do the fault, look at what is left, start again, compare the end.

Promises that are checked, each broken one a sentence in the result's ``problems``:

- a start goes on from the newest checkpoint that is valid by an independent check, never from a torn or damaged one;
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
from pathlib import Path

from latte_flow.tools.faults.inspection import (
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
from latte_flow.tools.faults.launches import (
    POLL_SECONDS,
    Launch,
    Starter,
    kill_group,
    send,
    wait_for_end,
    with_descendants,
)
from latte_flow.tools.faults.moments import ANYWHERE, DATA, LAUNCH, Watch, read_events
from latte_flow.tools.faults.plan import (
    ALL_RANKS,
    KILL_SECONDS,
    LAUNCHER,
    LEAVES,
    ONE_RANK,
    STOP_FILE,
    STOPS,
    TERM,
    TERM_TWICE,
    VICTIMS,
    Case,
    Fault,
    Schedule,
)  # fmt: skip
from latte_flow.training.errors import UserError
from latte_flow.training.monitor import preemption

PLAIN, WATCHED = "training/main.py", "tools/faults/slowed_training.py"
LIMIT = 600.0
"""Seconds after which a start, or what a fault has left of it, counts as hanging."""
ATTEMPTS = 3
"""How often a case is tried whose fault came too late for its moment, on a machine that was busy with something else."""


@dataclass(frozen=True)
class Pace:
    """How fast a run is, in seconds: from the start of its processes to its first step, and from one checkpoint to the next."""

    startup_seconds: float
    interval_seconds: float


@dataclass
class Start:
    """What happened to one start of a run.

    Attributes:
        fault: what was done to it; None for the start that is left to finish.
        before: the states of the checkpoints at its beginning (tools/faults/inspection.py).
        resumed_from: the checkpoint that it says it went on from.
        resumed_wrong: whether that is another one than the newest valid one.
        exit_code: the launcher's; None when it never ended.
        seconds: from the fault to the end of all processes.
        orphans: processes that outlived their killed launcher.
        damaged: what was damaged after the fault.
        after: the states of the checkpoints then.
        stopped_at: step of the newest valid checkpoint then.
        requeue: whether the run had left its marker.
    """

    fault: Fault | None
    before: dict[str, str]
    resumed_from: str | None = None
    resumed_wrong: bool = False
    exit_code: int | None = None
    seconds: float = 0.0
    orphans: int = 0
    damaged: str = ""
    after: dict[str, str] = field(default_factory=dict)
    stopped_at: int | None = None
    requeue: bool = False

    @property
    def accepted_torn(self) -> bool:
        """Whether it went on from something that is no valid checkpoint."""
        return self.resumed_from is not None and self.before.get(self.resumed_from) != VALID


@dataclass
class Result:
    """What happened to a case; ``missed``: a fault came when its moment was already over."""

    case: Case
    starts: list[Start] = field(default_factory=list)
    equal: dict[str, bool] = field(default_factory=dict)
    left_behind: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missed: bool = False
    seconds: float = 0.0

    def to_json(self) -> str:
        """Return this as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> "Result":
        """Return what ``to_json`` wrote."""
        fields = json.loads(text)
        case = Case(fields["case"]["number"], tuple(Fault(**f) for f in fields["case"]["faults"]))
        starts = [Start(**s | {"fault": s["fault"] and Fault(**s["fault"])}) for s in fields["starts"]]
        return Result(**fields | {"case": case, "starts": starts})


class Campaign:
    """The runs of a plan, all with the same arguments, and the undisturbed run that they are compared with.

    Args:
        start: starts the ranks.
        arguments: of training/main.py, without output_dir and data.num_workers.
        schedule: of these arguments.
        ranks: processes that ``start`` starts.
        output: folder for everything.
    """

    def __init__(self, *, start: Starter, arguments: Sequence[str], schedule: Schedule, ranks: int, output: Path):
        self.start, self.arguments, self.schedule, self.ranks, self.output = (
            start,
            list(arguments),
            schedule,
            ranks,
            output,
        )
        self.reference = output / "reference"
        self._pace: Pace | None = None
        self._launches: list[Launch] = []

    def close(self) -> None:
        """End what is still running, when the campaign itself is interrupted."""
        for launch in self._launches:
            kill_group(launch)

    @property
    def pace(self) -> "Pace":
        """How fast the undisturbed run was; trains it if there is none.

        Raises:
            UserError: when that run fails.
        """
        if self._pace is None:
            note = self.output / "reference.json"
            if not note.exists():
                note.write_text(json.dumps(asdict(self._train_reference())))
            self._pace = Pace(**json.loads(note.read_text()))
        return self._pace

    def _train_reference(self) -> "Pace":
        shutil.rmtree(self.reference, ignore_errors=True)
        self.output.mkdir(parents=True, exist_ok=True)
        log, events = self.output / "reference.log", self.output / "reference.events"
        for path in (log, events):
            path.unlink(missing_ok=True)
        launch = self._launch(WATCHED, self.reference, log, Watch(str(events)))
        times = []
        for event, count in (("start", self.ranks), ("train", 1), ("train", self.ranks * self.schedule.max_steps)):
            self._wait(launch, events, lambda seen, event=event, count=count: _count(seen, event) >= count)
            times.append(time.monotonic())
        if not wait_for_end(launch, LIMIT) or launch.poll() != 0:
            raise UserError(
                f"{log}: the run that nothing disturbs ended with {launch.poll()}; accepted: arguments that train"
            )
        return Pace(times[1] - times[0], (times[2] - times[1]) / self.schedule.intervals)

    def run(self, case: Case) -> Result:
        """Run a case, again where a fault came too late, and write its result to ``run_NNN/result.json``."""
        folder = self.output / f"run_{case.number:03d}"
        _ = self.pace
        for _ in range(ATTEMPTS):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            begin = time.monotonic()
            result = self._run(case, folder)
            result.seconds = time.monotonic() - begin
            if result.problems or not result.missed:
                break
        if result.missed and not result.problems:
            result.problems.append(f"no fault was put into its moment in {ATTEMPTS} attempts: nothing is shown")
        (folder / "result.json").write_text(result.to_json())
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
                watch = self._watch(fault, events)
                launch = self._launch(WATCHED, run, log, watch, workers=fault.workers)
                self._suffer(fault, launch, run, events, start, result)
            else:
                launch = self._launch(PLAIN, run, log)
                if not wait_for_end(launch, LIMIT):
                    result.problems.append(f"start {number} hung for {LIMIT:.0f} s")
                start.exit_code = launch.poll()
                if start.exit_code != 0:
                    result.problems.append(
                        f"start {number}, left to finish, ended with {start.exit_code}: see {log.name}"
                    )
            start.after = checkpoint_states(run)
            newest = newest_valid(start.after)
            start.stopped_at = newest and step_of(newest)
            start.requeue = (run / preemption.REQUEUE_FILE).exists()
            self._check_resume(start, log, events, number, result)
            if fault and not result.missed:
                (_check_kill if fault.action in VICTIMS else _check_signal)(
                    start, run, read_events(events), number, result
                )
                self._damage(fault, run, start)
            if result.problems or result.missed:
                return result
        result.equal = compare(run, self.reference, self.schedule.max_steps)
        result.problems += [
            f"{name} differ from the undisturbed run's" for name, equal in result.equal.items() if not equal
        ]
        if start.requeue:
            result.problems.append("the finished run still asks to be requeued")
        result.left_behind = left_behind(run, self.reference)
        if all(
            fault.action in VICTIMS for fault in case.faults
        ):  # a signal's checkpoint, of any step, is kept like others
            result.problems += [f"left behind: {name}" for name in result.left_behind]
        return result

    def _launch(self, script: str, run: Path, log: Path, watch: Watch | None = None, workers: int = 0) -> Launch:
        arguments = [*self.arguments, "--data.num_workers", str(workers), "--output_dir", str(run)]
        self._launches = [self.start(script, arguments, log, watch.variables() if watch else {})]
        return self._launches[0]

    def _watch(self, fault: Fault, events: Path) -> Watch:
        return Watch(
            events=str(events),
            moment=fault.moment,
            step=fault.step,
            seconds=fault.seconds,
            rank=fault.rank,
            first_index=(fault.step - 1) * self.schedule.batch,
        )

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
                return len(begun) == self.ranks
            if fault.moment == ANYWHERE:
                return trains
            return any(e["event"] == "inside" for e in seen) and (trains or fault.moment != DATA)

        if not self._wait(launch, events, inside):
            kill_group(launch)
            start.exit_code = launch.poll()
            # After a fault whose victims trained on for longer than planned, this one's moment may lie in the past.
            result.missed = start.exit_code == 0
            if not result.missed:
                ended = f"the start ended before, with {start.exit_code}: see {events.with_suffix('.log').name}"
                result.problems.append(f"{fault.moment}, step {fault.step}: {ended}")
            return
        window = {LAUNCH: self.pace.startup_seconds, ANYWHERE: self.pace.interval_seconds}.get(
            fault.moment, min(fault.seconds, KILL_SECONDS)
        )
        time.sleep(0.7 * fault.fraction * window)
        over = "train" if fault.moment == LAUNCH else "past"
        result.missed = launch.poll() is not None or any(e["event"] == over for e in read_events(events))
        if result.missed:
            kill_group(launch)
            return
        ranks = {e["rank"]: e["pid"] for e in read_events(events) if e["event"] == "start"}
        at = time.monotonic()
        _do(fault, launch, ranks, run)
        if fault.action == LAUNCHER:
            # What a user finds: the ranks train on as orphans. Until they are ended, too, a second start of the same command
            # fails at once, for their port is taken.
            time.sleep(fault.orphan_seconds)
            start.orphans = len([pid for pid in kill_group(launch) if pid != launch.pid])
        elif not wait_for_end(launch, LIMIT):
            result.problems.append(
                f"after {fault.action}, {fault.moment}: processes were left that hung for {LIMIT:.0f} s"
            )
        start.seconds = time.monotonic() - at
        start.exit_code = launch.poll()

    @staticmethod
    def _check_resume(start: Start, log: Path, events: Path, number: int, result: Result) -> None:
        start.resumed_from = resumed_from(log)
        trained = start.fault is None or any(e["event"] == "train" for e in read_events(events))
        newest = newest_valid(start.before)
        start.resumed_wrong = start.resumed_from != newest and bool(trained or start.resumed_from)
        if start.resumed_wrong:
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


def _count(events: list[dict], event: str) -> int:
    return sum(e["event"] == event for e in events)


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
        (run / preemption.STOP_FILE).touch()
    elif fault.action in STOPS:
        # A rank whose shard is half written is not the one that is signalled: it learns of it from the other.
        receivers = with_descendants(everyone, launch.pid) if fault.action == TERM else [ranks[max(ranks)]]
        send(receivers, _number(fault))
    else:
        send(everyone, _number(fault))
        time.sleep(preemption.REPEAT_SECONDS + 0.5)
        send(everyone, _number(fault))


def _number(fault: Fault) -> int:
    return signal.SIGTERM if fault.action in (TERM, TERM_TWICE) else signal.SIGUSR1


def _check_kill(start: Start, run: Path, events: list[dict], number: int, result: Result) -> None:
    if start.exit_code == 0 and start.fault.action != LAUNCHER:
        result.problems.append(f"start {number}: the launcher ended with 0 after {start.fault.action} had been killed")


def _check_signal(start: Start, run: Path, events: list[dict], number: int, result: Result) -> None:
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
    if start.exit_code != preemption.EXIT_STOPPED:
        say(f"{what}: exit code {start.exit_code} instead of {preemption.EXIT_STOPPED}")
    if not start.requeue:
        say(f"{what}: no file {preemption.REQUEUE_FILE}")
    if (run / preemption.STOP_FILE).exists():
        say(f"{what}: the stop file is still there, and would stop the next start")
