"""Ends a run in which a rank hangs and reports which rank and where; the others would wait forever in a collective.

The main thread of every rank records its current phase (a cheap assignment). A thread of each rank publishes that note in a store
held by rank 0; it is separate from the process group's store, which the hanging rank may block. When a rank makes no progress for
the configured time, the first rank to notice compares all notes. The ranks furthest behind are those the others wait for.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import astuple, dataclass
from datetime import timedelta

import torch.distributed as dist

from latte_flow.training.distributed.collectives import agree
from latte_flow.training.distributed.rendezvous import host_store

EXIT_HUNG = os.EX_SOFTWARE
PHASES = ("data", "forward", "backward", "optimizer step", "logging", "sampling", "after the step", "checkpoint")
"""The phases of a step, in this order; the first four once per micro-batch."""
ANSWER_SECONDS = 10.0
"""Timeout for the store to answer; a stopped process never answers, and no timeout of torch's store covers that."""
CLAIM, GUILTY = "claim", "guilty"


@dataclass(frozen=True)
class Note:
    """Progress of a rank: the step (counted from 1), micro-batch and phase it is in."""

    step: int
    micro_step: int
    phase: str

    @property
    def position(self) -> tuple[int, int, int]:
        """Sort key: orders notes by progress."""
        return self.step, self.micro_step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


class Watchdog:
    """Watches this rank and, when it makes no progress, all ranks. Creating one is collective.

    Args:
        limit: maximum seconds in one phase.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._interval = min(limit / 4, 15.0)
        self._beats = 0  # number of publications; a rank whose number does not grow is not responding
        self.enter(0, PHASES[-1])
        self._store = _make_store(self.rank)
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="watchdog store")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self.enter(0, PHASES[-1])
        self._thread.start()

    def enter(self, step: int, phase: str, micro_step: int = 0) -> None:
        """Record that the main thread enters a phase, one of PHASES."""
        self._note = Note(step, micro_step, phase)

    def stop(self) -> None:
        """Stop watching, at the end of the run."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._calls.shutdown(wait=False, cancel_futures=True)

    def _watch(self) -> None:
        seen, intervals = self._note, 0
        while not self._done.wait(self._interval):
            self._publish()
            # Counted, not timed: a job that is suspended and continued is not hung.
            seen, intervals = self._note, intervals + 1 if self._note is seen else 0
            if intervals * self._interval > self.limit:
                self._end(seen)
                intervals = 0

    def _publish(self) -> None:
        self._beats += 1
        self._ask("set", str(self.rank), json.dumps([self._beats, *astuple(self._note)]))

    def _end(self, mine: Note) -> None:
        """Report who hangs and exit the process; return only if the main thread made progress meanwhile."""
        claims = self._ask("add", CLAIM, 1)
        if claims is None:
            if self.rank == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0:  # at least one per node
                _say(
                    "error: rank 0, which tracks all ranks, does not answer: its process is stopped or dead, or its "
                    f"node is gone; rank {self.rank} has been in {mine} for {self.limit / 60:g} minutes (health.hang_minutes); "
                    "the same command resumes the run from its newest checkpoint"
                )
        elif claims == 1:
            explanation = self._explain(mine)
            if self._note is not mine:
                self._ask("set", CLAIM, "0")
                return
            _say(explanation)
            time.sleep(self._interval)  # lets the hanging ranks print their tracebacks
        else:
            deadline = time.monotonic() + 4 * self._interval + ANSWER_SECONDS
            while time.monotonic() < deadline and not self._ask("check", [GUILTY]):
                if self._note is not mine:
                    return
                self._publish()  # otherwise this rank would look dead
                time.sleep(self._interval / 2)
            guilty = self._ask("get", GUILTY)
            if guilty and self.rank in json.loads(guilty):
                faulthandler.dump_traceback(file=sys.stderr)
            time.sleep(2 * self._interval)  # a launcher kills all ranks as soon as one exits
        # Not an exception: the main thread is blocked inside a library and would never see it.
        os._exit(EXIT_HUNG)

    def _explain(self, mine: Note) -> str:
        before = self._read_notes()
        time.sleep(2 * self._interval)
        notes = self._read_notes() | {self.rank: (0, mine)}
        silent = [
            rank
            for rank in range(self.world_size)
            if rank not in notes or (rank != self.rank and rank in before and notes[rank][0] == before[rank][0])
        ]
        spoken = {rank: note for rank, (_, note) in notes.items() if rank not in silent}
        last = min(note.position for note in spoken.values())
        guilty = silent or [rank for rank, note in spoken.items() if note.position == last]
        if self._note is mine:
            self._ask("set", GUILTY, json.dumps(guilty))
        head = f"error: no progress for {self.limit / 60:g} minutes (health.hang_minutes) in step {mine.step}: "
        if silent:
            who = f"{_ranks(silent)} does not answer: its process is stopped or dead, or its node is gone"
        elif len(guilty) == self.world_size:
            who = f"all ranks are in {spoken[guilty[0]]}"
        else:
            others = sorted({str(note) for rank, note in spoken.items() if rank not in guilty})
            who = f"{_ranks(guilty)} is in {spoken[guilty[0]]}, while the others are in {'; '.join(others)}"
        return f"{head}{who}; the same command resumes the run from its newest checkpoint"

    def _read_notes(self) -> dict[int, tuple[int, Note]]:
        """Return rank -> (number of its publications, its note)."""
        notes = {}
        for rank in range(self.world_size):
            if self._ask("check", [str(rank)]) and (text := self._ask("get", str(rank))):
                beats, *note = json.loads(text)
                notes[rank] = beats, Note(*note)
        return notes

    def _ask(self, method: str, *arguments):
        """Call the store. Return its answer, or None if there is none in time, and for ``set``, which has none."""
        try:
            return self._calls.submit(getattr(self._store, method), *arguments).result(ANSWER_SECONDS)
        except (TimeoutError, RuntimeError):  # torch's store raises RuntimeError
            return None


def _make_store(rank: int) -> dist.TCPStore:
    """Return a store held by rank 0 and reachable from all ranks. Collective."""
    patience = timedelta(seconds=ANSWER_SECONDS)
    host = agree(os.environ.get("MASTER_ADDR") or socket.gethostname())
    if rank == 0:
        store = host_store(host, 0, timeout=patience, wait_for_workers=False)
    port = agree(store.port if rank == 0 else 0)
    return store if rank == 0 else dist.TCPStore(host, port, timeout=patience, wait_for_workers=False)


def _say(message: str) -> None:
    print(f"\n{message}", file=sys.stderr, flush=True)  # a progress bar leaves the cursor at the end of its line


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
