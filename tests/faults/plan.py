"""Which faults a campaign puts where: a function of the seed alone, so that one run of it can be repeated.

A case is one training run that suffers its faults one after the other, each in the start that resumes after the one before, and
is then left to finish. The run's steps are divided into the intervals between its checkpoints; the faults of one case lie in
growing intervals, so that each of them is reached whatever the one before has destroyed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random

from latte_flow.training.configs.fields import TrainingConfig
from tests.faults.moments import (
    ANYWHERE,
    BUILD,
    DATA,
    GRID,
    HALF_SHARD,
    LAUNCH,
    REMOVAL,
    RESUME,
    SAVE_MOMENTS,
    STEP,
)  # fmt: skip

RANKS = 2
"""Processes of each training."""

ONE_RANK, ALL_RANKS, LAUNCHER = "one rank", "all ranks", "the launcher"
VICTIMS = (ONE_RANK, ALL_RANKS, LAUNCHER)
"""Who is killed with SIGKILL."""
KILL_MOMENTS = (LAUNCH, BUILD, STEP, ANYWHERE, GRID, *SAVE_MOMENTS, RESUME)

TERM, INT, USR1, STOP_FILE, TERM_TWICE, USR1_TWICE = (
    "SIGTERM to all", "SIGINT to all", "SIGUSR1 to one rank", "stop file", "SIGTERM twice", "SIGUSR1 twice",
)  # fmt: skip
STOPS = (TERM, INT, USR1, STOP_FILE)
"""How a run is asked to stop. SIGTERM goes to every rank and data worker, as from SLURM's scancel, and SIGINT, as from Ctrl-C;
SIGUSR1 to one rank alone, from which the others learn of it; the stop file is what a batch script writes before the job's time
limit."""
LEAVES = (TERM_TWICE, USR1_TWICE)
"""How a run is made to leave at once, without a checkpoint: the same signal again, to every rank."""
SIGNAL_MOMENTS = (HALF_SHARD, STEP, GRID, DATA)
SIGNAL_CHAINS = [[pair] for pair in product((*STOPS, *LEAVES), SIGNAL_MOMENTS)]
"""A run for every pair of a signal and a moment."""

DAMAGES = ("cut", "flipped", "lost")
"""What a power failure or a bad disk does to a file of the newest checkpoint: cut to its half, one bit flipped, gone."""
KILL_SECONDS = 1.0
ORPHAN_SECONDS = 3.0
"""Ranks that have lost their launcher notice it in the moment, and stop after its step: they do not reach the next kill's."""
STOP_SECONDS = 2.0
LEAVE_SECONDS = 60.0
"""How long a moment is made for each kind of fault. Nobody waits for the last: leaving ends it."""


@dataclass(frozen=True)
class Schedule:
    """The steps at which a run does what faults are put into.

    Args:
        max_steps: of the run, a multiple of ``save_every``.
        save_every: steps between two checkpoints.
        grid_every: steps between two sample grids; 0: none.
        keep_last: checkpoints that are kept; 0: all.
        batch: samples a step.
    """

    max_steps: int
    save_every: int
    grid_every: int
    keep_last: int
    batch: int

    @staticmethod
    def of(config: TrainingConfig) -> "Schedule":
        """Return a training configuration's.

        Raises:
            ValueError: when faults cannot be placed in it.
        """
        every = config.checkpoint.every
        if config.max_steps % every or config.max_steps < 4 * every or every < 3:
            raise ValueError(
                f"checkpoint.every: got {every} with max_steps {config.max_steps}; accepted: 3 or more, and max_steps a "
                "multiple of it, 4 times or more"
            )
        if config.logging.every != 1:
            raise ValueError(f"logging.every: got {config.logging.every}; accepted: 1, every step is compared")
        return Schedule(
            config.max_steps, every, config.sample.every, config.checkpoint.keep_last, config.global_batch_size
        )

    @property
    def intervals(self) -> int:
        """How many times a checkpoint is saved."""
        return self.max_steps // self.save_every

    def steps(self, moment: str, interval: int) -> list[int]:
        """Return at which steps of an interval, counted from 0, a moment comes; moments before the first step come at step 0."""
        first, last = interval * self.save_every + 1, (interval + 1) * self.save_every
        if moment in (LAUNCH, BUILD):
            return [0] if interval == 0 else []
        if moment == GRID:
            return [s for s in range(first, last + 1) if self.grid_every and s % self.grid_every == 0]
        if moment == REMOVAL:
            return [last] if 0 < self.keep_last <= interval else []
        if moment in SAVE_MOMENTS:
            return [last]
        if moment == ANYWHERE:  # in the interval that begins there
            return [first]
        if moment == RESUME:  # of the run that was killed there
            return list(range(first, last + 1)) if interval > 0 else []
        return list(range(first, last + 1))


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        action: of VICTIMS, killed with SIGKILL; or of STOPS or LEAVES.
        moment: of moments.py.
        step: whose moment it is.
        rank: who is killed by ONE_RANK or signalled by USR1, and whose shard is half written; counted from 0.
        fraction: where in the moment it comes, 0 to 1.
        damage: of DAMAGES, done to the newest checkpoint after the kill; empty for none.
        damaged_file: which of its files, 0 to 1 of their sorted list.
        seconds: how long the moment is made.
        workers: data workers a rank.
    """

    action: str
    moment: str
    step: int
    rank: int = 0
    fraction: float = 0.5
    damage: str = ""
    damaged_file: float = 0.0
    seconds: float = KILL_SECONDS
    workers: int = 0


@dataclass(frozen=True)
class Case:
    """One training run and the faults that it suffers, in order."""

    name: str
    faults: tuple[Fault, ...]


def kill_cases(schedule: Schedule, *, seed: int, runs: int, kills_per_run: int = 1) -> list[Case]:
    """Return the runs of a campaign of kills.

    The pairs of a victim and a moment are dealt in a shuffled order, over and over, so that each comes equally often.

    Args:
        schedule: the training run's.
        seed: of everything that is drawn.
        runs: how many cases.
        kills_per_run: in each; a kill while resuming needs one before it, which is not counted.

    Raises:
        ValueError: when a run has too few checkpoints for so many kills.
    """
    if not 1 <= kills_per_run <= schedule.intervals:
        raise ValueError(f"kills_per_run: got {kills_per_run}; accepted: 1 to {schedule.intervals}, a checkpoint each")
    possible = [m for m in KILL_MOMENTS if any(schedule.steps(m, i) for i in range(schedule.intervals))]
    pairs = list(product(VICTIMS, possible))
    if kills_per_run > 1:  # this moment has no length: ranks without a launcher would train past the next kill's
        pairs = [pair for pair in pairs if pair != (LAUNCHER, ANYWHERE)]
    deck = _deal(pairs, Random(f"{seed} order"))
    waiting: list[tuple[str, str]] = []
    cases = []
    for number in range(runs):
        random, faults, interval = Random(f"{seed} {number}"), [], -1
        for position in range(kills_per_run):
            later = kills_per_run - 1 - position
            free = range(interval + 1, schedule.intervals - later)
            victim, moment, choices = _next_fitting(deck, waiting, schedule, free)
            interval = random.choice(choices)
            step = random.choice(schedule.steps(moment, interval))
            fault = Fault(
                action=victim,
                moment=moment,
                step=step,
                rank=random.randrange(RANKS),
                fraction=random.random(),
                damage=random.choice(DAMAGES) if random.random() < 0.25 else "",
                damaged_file=random.random(),
                seconds=ORPHAN_SECONDS if victim == LAUNCHER else KILL_SECONDS,
            )
            if moment == RESUME:
                faults.append(replace(fault, action=ALL_RANKS, moment=STEP, damage="", seconds=KILL_SECONDS))
            faults.append(fault)
        cases.append(Case(f"kill-{number}", tuple(faults)))
    return cases


def _deal(cards: list, random: Random) -> Iterator:
    """Yield all cards in a random order, then all in another, without end."""
    while True:
        random.shuffle(cards)
        yield from cards


def _next_fitting(deck: Iterator, waiting: list, schedule: Schedule, free: range) -> tuple[str, str, list[int]]:
    """Return the next pair that comes in one of the free intervals, and in which; those before it wait for their turn."""
    passed = []
    while True:
        victim, moment = waiting.pop(0) if waiting else next(deck)
        choices = [i for i in free if schedule.steps(moment, i)]
        if choices:
            waiting[:0] = passed
            return victim, moment, choices
        passed.append((victim, moment))


def signal_cases(schedule: Schedule, chains: Sequence[Sequence[tuple[str, str]]] = SIGNAL_CHAINS) -> list[Case]:
    """Return the runs of a campaign of signals.

    Args:
        schedule: the training run's.
        chains: for each run its (signal, moment) pairs; the pair at place j comes in the run's interval j.
    """
    cases = []
    for number, chain in enumerate(chains):
        faults = []
        for place, (action, moment) in enumerate(chain):
            interval = place if len(chain) > 1 else 1
            # Not the first: a stop that was asked for in the save before ends the first step of this interval.
            step = (
                schedule.steps(moment, interval)[-1]
                if moment in (HALF_SHARD, GRID)
                else interval * schedule.save_every + 2
            )
            workers = int(moment == DATA or action == TERM)
            seconds = LEAVE_SECONDS if action in LEAVES else STOP_SECONDS
            rank = RANKS - 1 if moment != HALF_SHARD else 0
            faults.append(Fault(action, moment, step, rank=rank, fraction=0.2, seconds=seconds, workers=workers))
        cases.append(Case(f"signal-{number}", tuple(faults)))
    return cases
