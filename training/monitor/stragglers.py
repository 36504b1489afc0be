"""Straggler detection: the seconds each rank needs for its own part of a step.

The duration of a whole step is the same on all ranks, because they wait for each other in every backward pass. What differs is
the time until then: waiting for data, and the forward pass (which under ZeRO-3 also waits for other ranks to gather weights).
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class RankTimer:
    """Times a rank's own work between two reports, without synchronising with the GPU.

    Args:
        device: device of the forward pass.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Time the body on the host."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Time the work that the body launches on the device."""
        if self.device.type == "cpu":
            with self.on_host():
                yield
            return
        start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def report(self, steps: int) -> dict[str, float]:
        """Return the mean seconds per step: minimum, median and maximum over the ranks, and the slowest rank. Collective.

        Call it after a synchronisation with the device.

        Args:
            steps: number of steps since the last report.
        """
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        mine = torch.tensor([seconds / steps], dtype=torch.float64, device=self.device)
        gathered = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        values = torch.cat(gathered).tolist()
        return {
            "rank_seconds_min": min(values),
            "rank_seconds_median": statistics.median(values),
            "rank_seconds_max": max(values),
            "slowest_rank": values.index(max(values)),
        }
