"""Ends a run in which a rank hangs, and says which rank and where: the others wait for it in a collective operation for ever.

Every rank's main thread notes what it is doing (a cheap assignment). A thread of each rank publishes that note in a store that
rank 0 holds; the store is not the process group's, which the hanging rank may block. When a rank has not moved on for the
configured time, the first to find that out compares all notes. Who stands furthest back is who the others wait for.
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

EXIT_HUNG = os.EX_SOFTWARE
PHASES = ("data", "forward", "backward", "optimizer step", "logging", "sampling", "after the step", "checkpoint")
"""What a step consists of, in this order; the first four once a micro-batch."""
ANSWER_SECONDS = 10.0
"""How long the store may take; a stopped process answers never, and no timeout of torch's store covers that."""
CLAIM, GUILTY = "claim", "guilty"


@dataclass(frozen=True)
class Note:
    """Where a rank stands: in a phase of a micro-batch of a step, which is counted from 1."""

    step: int
    micro_step: int
    phase: str

    @property
    def position(self) -> tuple[int, int, int]:
        """Sorts notes by how far they are."""
        return self.step, self.micro_step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


class Watchdog:
    """Watches this rank and, when it stands still, all ranks. Creating one is collective.

    Args:
        limit: seconds that a rank may stay in one phase.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._interval = min(limit / 4, 15.0)
        self._beats = 0  # publications; a rank whose number stands still does not answer
        self.enter(0, PHASES[-1])
        self._store = _make_store(self.rank)
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="watchdog store")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self.enter(0, PHASES[-1])
        self._thread.start()

    def enter(self, step: int, phase: str, micro_step: int = 0) -> None:
        """Note that the main thread begins a phase, one of PHASES."""
        self._note = Note(step, micro_step, phase)

    def stop(self) -> None:
        """Stop watching, when the run ends."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._calls.shutdown(wait=False, cancel_futures=True)

    def _watch(self) -> None:
        seen, intervals = self._note, 0
        while not self._done.wait(self._interval):
            self._publish()
            # Counted, not timed: a job that is suspended and continued has not hung.
            seen, intervals = self._note, intervals + 1 if self._note is seen else 0
            if intervals * self._interval > self.limit:
                self._end(seen)
                intervals = 0

    def _publish(self) -> None:
        self._beats += 1
        self._ask("set", str(self.rank), json.dumps([self._beats, *astuple(self._note)]))

    def _end(self, mine: Note) -> None:
        """Say who hangs and leave; return only if the main thread has gone on meanwhile."""
        claims = self._ask("add", CLAIM, 1)
        if claims is None:
            if self.rank == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one of each node at least
                _say(
                    "error: rank 0, which knows where all ranks stand, does not answer: its process is stopped or dead, or its "
                    f"node is gone; rank {self.rank} has been in {mine} for {self.limit / 60:g} minutes (health.hang_minutes); "
                    "the same command resumes the run from its newest checkpoint"
                )
        elif claims == 1:
            explanation = self._explain(mine)
            if self._note is not mine:
                self._ask("set", CLAIM, "0")
                return
            _say(explanation)
            time.sleep(self._interval)  # for the tracebacks of those who are to blame
        else:
            deadline = time.monotonic() + 4 * self._interval + ANSWER_SECONDS
            while time.monotonic() < deadline and not self._ask("check", [GUILTY]):
                if self._note is not mine:
                    return
                self._publish()  # silence would make this rank look dead
                time.sleep(self._interval / 2)
            guilty = self._ask("get", GUILTY)
            if guilty and self.rank in json.loads(guilty):
                faulthandler.dump_traceback(file=sys.stderr)
            time.sleep(2 * self._interval)  # a launcher ends all ranks as soon as one has ended
        # Not an exception: the main thread waits inside a library and would never see it.
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
        """Return rank -> (its publications, its note)."""
        notes = {}
        for rank in range(self.world_size):
            if self._ask("check", [str(rank)]) and (text := self._ask("get", str(rank))):
                beats, *note = json.loads(text)
                notes[rank] = beats, Note(*note)
        return notes

    def _ask(self, method: str, *arguments):
        """Call the store; None when it does not answer, and for ``set``, which waits for no answer."""
        try:
            return self._calls.submit(getattr(self._store, method), *arguments).result(ANSWER_SECONDS)
        except (TimeoutError, RuntimeError):  # torch's errors of the store are RuntimeErrors
            return None


def _make_store(rank: int) -> dist.TCPStore:
    """Return a store that rank 0 holds and all ranks reach. Collective."""
    patience = timedelta(seconds=ANSWER_SECONDS)
    host = agree(os.environ.get("MASTER_ADDR") or socket.gethostname())
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=patience, wait_for_workers=False)
    port = agree(store.port if rank == 0 else 0)
    return store if rank == 0 else dist.TCPStore(host, port, timeout=patience, wait_for_workers=False)


def _say(message: str) -> None:
    print(f"\n{message}", file=sys.stderr, flush=True)  # a progress bar leaves the cursor at the end of its line


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
