"""Stopping a run early so that it can be resumed later.

A stop is requested by SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) to the process of any rank, by the end of its launcher (launcher.py),
or by a file ``output_dir/stop`` created by a batch script or a person. All ranks agree on the request after every optimizer
step, save a checkpoint of that step and exit with EXIT_STOPPED; ``output_dir/requeue`` then names the SLURM job to requeue, if
any. Batch scripts check that file, not the exit code, because launchers replace it: torchrun exits with 1. ``deepspeed`` does
not forward signals, but the stop file works under every launcher.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from latte_flow.training.data.workers import STOP_SIGNALS
from latte_flow.training.errors import UserError
from latte_flow.training.monitor.launcher import watch_launcher

STOP_FILE = "stop"
REQUEUE_FILE = "requeue"
REQUESTS_SINCE = "LATTE_FLOW_REQUESTS_SINCE"
"""Environment variable set by a batch script: stop files older than this time (Unix seconds) were meant for an earlier start."""
FOLDER_LOST = 2
"""Value of the flag that is reduced over the ranks; 1 is a request to stop."""
EXIT_STOPPED = os.EX_TEMPFAIL
REPEAT_SECONDS = 2.0
"""A signal repeated within this time is the same request: srun, a launcher and the kernel may each deliver it."""


class StopRequest:
    """Tracks whether this run was asked to stop; installs the signal handlers. Its methods are collective.

    A second signal ends the process immediately with 128 + its number. Python runs no signal handlers while the main thread waits
    inside a collective, so a thread reads the signals from Python's wake-up pipe.

    Args:
        output_dir: output_dir of the run; rank 0 checks for the stop file there and removes the marker of an earlier stop.
        device: device of the flag that is reduced over the ranks.
        launchers: the processes that started this rank (launcher.py).
        folder_is_there: returns whether rank 0 still finds the output_dir of this start (run_lock.py).

    Raises:
        ValueError: outside the main thread, where Python cannot install signal handlers.
    """

    def __init__(
        self,
        output_dir: Path,
        device: torch.device,
        launchers: list[tuple[int, int]],
        folder_is_there: Callable[[], bool],
    ):
        self._folder_is_there = folder_is_there
        self.stop_file = output_dir / STOP_FILE
        self.requeue_file = output_dir / REQUEUE_FILE
        self._is_first_rank = dist.get_rank() == 0
        self._signalled_at: float | None = None
        self._stopped = False
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._answer = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copied = None if device.type == "cpu" else torch.Event(device)
        if self._is_first_rank:
            self.requeue_file.unlink(missing_ok=True)
            since = float(os.environ.get(REQUESTS_SINCE, 0))
            if self.stop_file.exists() and self.stop_file.stat().st_mtime < since:
                self.stop_file.unlink(missing_ok=True)

        self._pipe, pipe_end = os.pipe()
        os.set_blocking(pipe_end, False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # signals appear in the pipe only if they have a Python handler
        signal.set_wakeup_fd(pipe_end, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
        watch_launcher(self._launcher_lost, launchers)

    def poll(self, *, wait: bool = False) -> bool:
        """Return whether any rank was asked to stop, the same on all ranks. Call it after every optimizer step, before a save.

        On a GPU the result is the one reduced at the previous call: reading the newest one would make the host wait for all work
        queued on the device.

        Args:
            wait: wait for the newest result, after long work such as drawing samples.

        Raises:
            UserError: on all ranks, when the output_dir was renamed, removed or replaced.
        """
        asked = int(self._signalled_at is not None or (self._is_first_rank and self.stop_file.is_file()))
        if not self._folder_is_there():
            asked = FOLDER_LOST
        if self._copied is not None:
            self._read()
        self._flag.fill_(asked)
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        self._answer.copy_(self._flag, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if wait or self._copied is None:
            self._read()
        return self._stopped

    def finish(self, *, stopped: bool) -> None:
        """Write or remove the marker file, and remove the stop file.

        Call it after the last checkpoint is committed. It ends with a barrier, because a launcher signals the other ranks when it
        sees rank 0 exit.

        Args:
            stopped: whether the run ends because of a request and should be requeued.
        """
        if self._is_first_rank:
            if stopped:
                self.requeue_file.write_text(os.environ.get("SLURM_JOB_ID", "") + "\n")
            else:
                self.requeue_file.unlink(missing_ok=True)
            self.stop_file.unlink(missing_ok=True)
        dist.barrier()

    def _read(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        answer = self._answer.item()
        if answer == FOLDER_LOST:
            raise UserError(
                f"output_dir: {self.stop_file.parent} was renamed, removed or replaced while the run was training; the steps "
                "after its newest checkpoint are lost; accepted: the folder under this name again; the same command then resumes"
            )
        self._stopped = self._stopped or bool(answer)
        if self._stopped and self._is_first_rank:
            self.stop_file.unlink(missing_ok=True)  # so that it cannot stop the next start, however this one ends

    def _launcher_lost(self) -> None:
        if self._signalled_at is None:
            self._signalled_at = time.monotonic()
            message = "the launcher of this rank has ended: stopping after this step"
            with suppress(OSError, ValueError):  # the terminal may be gone with it
                print(message, file=sys.stderr, flush=True)

    def _listen(self) -> None:
        """Read signal numbers as they arrive; signals with other Python handlers appear in the pipe too."""
        while byte := os.read(self._pipe, 1):
            number = byte[0]
            if number not in STOP_SIGNALS:
                continue
            now = time.monotonic()
            if self._signalled_at is None:
                self._signalled_at = now
                name = signal.Signals(number).name
                print(
                    f"{name}: stopping after this step; send it again to exit immediately", file=sys.stderr, flush=True
                )
            elif now - self._signalled_at > REPEAT_SECONDS:
                os._exit(128 + number)
