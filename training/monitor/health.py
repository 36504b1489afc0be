"""Training health: skipped steps and loss spikes.

If a gradient is not finite, DeepSpeed skips the update on all ranks. This module counts such steps and reports their samples;
too many consecutive ones end the run.
"""

import statistics
from collections import deque
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from latte_flow.training.configs.fields import HealthConfig
from latte_flow.training.distributed.collectives import gather

MIN_HISTORY = 20
"""Number of losses before the first comparison with their median."""


class StepHealth:
    """Tracks the steps of a run. Losses stay on the device until ``report``; only a skipped step communicates immediately.

    Args:
        config: limits.
        global_batch_size: samples per step.
        group: the data-parallel group of this rank; None for all ranks.

    Attributes:
        consecutive_skips: number of consecutive skipped steps up to now.
    """

    def __init__(self, config: HealthConfig, global_batch_size: int, group: dist.ProcessGroup | None = None):
        self.config = config
        self.global_batch_size = global_batch_size
        self.group = group
        self.consecutive_skips = 0
        self._skipped: list[dict] = []  # since the last report
        # (step, this rank's [sum, count] of losses), not yet summed over ranks
        self._sums: list[tuple[int, Tensor]] = []
        self._losses: list[tuple[int, float]] = []  # (step, mean loss over all ranks) since the last report
        self._history: deque[float] = deque(maxlen=config.spike_window)

    def step_done(self, step: int, losses: Tensor) -> None:
        """Record a step (counted from 1) that updated the weights; its loss is the mean of ``losses`` over all ranks."""
        self.consecutive_skips = 0
        values = losses.detach().double()
        self._sums.append((step, torch.stack([values.sum(), torch.ones_like(values).sum()])))

    def step_skipped(self, step: int, losses: Mapping[str, tuple[Tensor, Tensor]]) -> dict:
        """Record a skipped step and return its entry in metrics.jsonl. Collective.

        Args:
            step: counted from 1.
            losses: name -> (losses of this rank's samples [rows], their global indices [rows]).
        """
        self.consecutive_skips += 1
        mine = {name: set(indices[~torch.isfinite(values)].tolist()) for name, (values, indices) in losses.items()}
        parts = gather(mine, self.group)
        entry = {
            "step": step,
            "samples": [(step - 1) * self.global_batch_size, step * self.global_batch_size - 1],
            **{f"nonfinite_{name}": sorted(index for part in parts for index in part[name]) for name in losses},
        }
        self._skipped.append(entry)
        return entry

    def report(self) -> dict:
        """Return the metrics.jsonl entries for the steps since the last report. Collective.

        Returns:
            ``loss_spike_ratio``, the largest ratio of a loss to the median of the steps before it (absent while there are too few
            steps); ``loss_spikes`` and ``skipped``, lists of the affected steps, absent when empty.
        """
        self._add_over_ranks()
        ratios, spikes = [], []
        for step, loss in self._losses:
            if len(self._history) >= min(MIN_HISTORY, self.config.spike_window):
                ratios.append(loss / max(statistics.median(self._history), 1e-30))
                if ratios[-1] > self.config.spike_ratio:
                    spikes.append({"step": step, "loss": loss, "ratio": ratios[-1]})
            self._history.append(loss)
        report: dict = {"loss_spike_ratio": max(ratios)} if ratios else {}
        report |= {"loss_spikes": spikes} if spikes else {}
        report |= {"skipped": self._skipped} if self._skipped else {}
        self._losses, self._skipped = [], []
        return report

    def state_dict(self, *, forget_skipped: int = 0) -> dict:
        """Return the state from which a resumed run reports the same values, on any number of ranks. Collective.

        Args:
            forget_skipped: number of newest steps, all of them skipped, to leave out.
        """
        self._add_over_ranks()
        kept = max(len(self._skipped) - forget_skipped, 0)  # some may have been reported already
        return {
            "skipped_in_a_row": self.consecutive_skips - forget_skipped,
            "skipped": self._skipped[:kept],
            "losses": list(self._losses),
            "history": list(self._history),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the state returned by ``state_dict``."""
        self.consecutive_skips = state["skipped_in_a_row"]
        self._skipped = list(state["skipped"])
        self._losses = [(step, loss) for step, loss in state["losses"]]
        self._history = deque(state["history"], maxlen=self.config.spike_window)

    def _add_over_ranks(self) -> None:
        if not self._sums:
            return
        sums = torch.stack([values for _, values in self._sums])
        dist.all_reduce(sums, group=self.group)
        steps = [step for step, _ in self._sums]
        self._losses += [(step, total / count) for step, (total, count) in zip(steps, sums.tolist(), strict=True)]
        self._sums = []
