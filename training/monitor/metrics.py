"""Metrics of a run (losses by group and timestep, gradient norms, gates, throughput), logged to metrics.jsonl and TensorBoard."""

import json
import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import summary

from latte_flow.model.flow_matching import NUM_TRAIN_TIMESTEPS
from latte_flow.model.images import to_pil
from latte_flow.training.checkpoint.manifest import step_name
from latte_flow.training.distributed.zero import gradient_norms
from latte_flow.training.monitor.logs import EventFile, LogFile, replace_file, skip_failures

_POSITIVE_BINS = 1e-12 * 1.1 ** np.arange(774)
HISTOGRAM_BINS = np.concatenate([-_POSITIVE_BINS[::-1], [0], _POSITIVE_BINS])
"""TensorBoard's bins, up to 1e20."""


class LossMeter:
    """Sums losses on the device between two logged steps: in total, per group and per bin of tau. No host synchronisation.

    The sums are local to this rank; ``compute`` reduces them over the data-parallel group.

    Args:
        num_groups: K.
        timestep_bins: number of bins of tau.
        device: device of the losses.
        group: the data-parallel group of this rank; None for all ranks.
    """

    def __init__(
        self, num_groups: int, timestep_bins: int, device: torch.device, group: dist.ProcessGroup | None = None
    ):
        self.num_groups, self.timestep_bins, self.group = num_groups, timestep_bins, group
        # Rows: sum, count. Columns: groups, then bins. float64, so that the order of additions does not matter.
        self.totals = torch.zeros(2, num_groups + timestep_bins, dtype=torch.float64, device=device)

    def update(self, losses: Tensor, groups: Tensor, timesteps: Tensor) -> None:
        """Add per-sample losses [B] of samples in groups [B] at timesteps [B]."""
        bins = (timesteps / NUM_TRAIN_TIMESTEPS * self.timestep_bins).long().clamp(max=self.timestep_bins - 1)
        columns = torch.cat([groups, self.num_groups + bins])
        values = losses.detach().double()
        self.totals[0].index_add_(0, columns, torch.cat([values, values]))
        self.totals[1].index_add_(0, columns, torch.ones_like(columns, dtype=torch.float64))

    def compute(self) -> dict[str, float]:
        """Return the mean losses over all ranks since the last call (``loss``: NaN if there were none) and reset. Collective."""
        totals = self.totals.clone()
        if dist.is_initialized():
            dist.all_reduce(totals, group=self.group)
        self.totals.zero_()
        sums, counts = totals.tolist()
        k = self.num_groups
        metrics = {"loss": sum(sums[:k]) / sum(counts[:k]) if sum(counts[:k]) else math.nan}
        metrics |= {f"loss_group_{g}": sums[g] / counts[g] for g in range(k) if counts[g]}
        width = NUM_TRAIN_TIMESTEPS / self.timestep_bins
        for i in range(self.timestep_bins):
            if counts[k + i]:
                metrics[f"loss_tau_{round(i * width):04d}_{round((i + 1) * width):04d}"] = sums[k + i] / counts[k + i]
        return metrics

    def state_dict(self) -> list[list[list[float]]]:
        """Return the sums of all ranks, so that a run resumed between two logged steps reports the same means. Collective."""
        gathered = [torch.zeros_like(self.totals) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, self.totals, self.group)
        return [totals.tolist() for totals in gathered]

    def load_state_dict(self, state: list) -> None:
        """Restore this rank's sums. If the number of ranks changed, rank 0 takes all of them; if the bins changed, drop them."""
        totals = torch.tensor(state, dtype=torch.float64)
        if totals.shape[1:] != self.totals.shape:  # logging.timestep_bins has changed
            return
        if len(totals) == dist.get_world_size(self.group):
            self.totals.copy_(totals[dist.get_rank(self.group)])
        elif dist.get_rank(self.group) == 0:
            self.totals.copy_(totals.sum(0))


def expert_gradient_norms(engine, group_labels: list[str]) -> dict[str, Tensor]:
    """Return the gradient norm per label before clipping, over all ranks. Collective; call it between backward and step.

    Args:
        engine: a DeepSpeed engine with ZeRO, at a gradient accumulation boundary.
        group_labels: the label of each optimizer parameter group; groups with the same label are combined.
    """
    squares: dict[str, Tensor] = {}
    for index, norm in gradient_norms(engine.optimizer):
        label = group_labels[index]
        squares[label] = squares.get(label, 0) + norm.float().square()
    return {label: square.sqrt() for label, square in squares.items()}


class MetricsWriter:
    """Writes logged steps to metrics.jsonl (one JSON object per line) and TensorBoard. Only rank 0 has one.

    What cannot be written is skipped and counted (logs.py).

    Args:
        output_dir: the output_dir of the run.
        resumed_step: entries after this step, logged by a run that continued beyond its last checkpoint, are dropped because the
            steps are computed again.
    """

    def __init__(self, output_dir: Path, resumed_step: int):
        self.path = output_dir / "metrics.jsonl"
        self._resumed_step = resumed_step
        self._lines: LogFile | None = None
        self._events = EventFile(output_dir / "tensorboard", purge_step=resumed_step + 1)
        with skip_failures(self.path.name):
            self._open()

    def _open(self) -> LogFile:
        """Return metrics.jsonl without the lines to drop. They must be gone before the first line is appended."""
        if self._lines is None:
            if self.path.exists():
                lines = self.path.read_bytes().splitlines(keepends=True)
                kept = (line for line in lines if line.endswith(b"\n") and self._is_kept(line))
                replace_file(self.path, b"".join(kept))
            self._lines = LogFile(self.path)
        return self._lines

    def _is_kept(self, line: bytes) -> bool:
        try:
            return json.loads(line)["step"] <= self._resumed_step
        except (ValueError, KeyError, TypeError) as error:
            print(f"{self.path}: a damaged line is dropped ({error}): {line[:80]!r}", flush=True)
            return False

    def scalars(self, step: int, metrics: dict) -> None:
        """Log one step's metrics; values that are not numbers, such as lists of events, go to metrics.jsonl only.

        Non-finite numbers become null, because JSON cannot represent them.
        """
        entry = {"step": step} | {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        line = json.dumps(entry) + "\n"
        with skip_failures(self.path.name):
            self._open().append(line.encode())
        numbers = {name: value for name, value in entry.items() if name != "step" and isinstance(value, int | float)}
        self._events.add([summary.scalar(_tensorboard_tag(name), value) for name, value in numbers.items()], step)

    def gates(self, step: int, gates: Mapping[int, Tensor]) -> None:
        """Log the gate values of each layer [B, H]: the mean per layer, and the distribution over heads and timesteps."""
        summaries = []
        for layer, values in gates.items():
            summaries.append(summary.scalar(f"gate_mean/layer_{layer:02d}", values.mean().item()))
            flat = values.flatten().cpu().numpy()
            summaries.append(summary.histogram(f"gate/layer_{layer:02d}", flat, HISTOGRAM_BINS))
        self._events.add(summaries, step)

    def grid(self, step: int, pixels: np.ndarray) -> None:
        """Log a sample grid, uint8 [height, width] or [height, width, 3]: samples/step_XXXXXXX.png and TensorBoard."""
        png = BytesIO()
        to_pil(pixels).save(png, "PNG")
        with skip_failures("a sample grid"):
            replace_file(self.path.parent / "samples" / f"{step_name(step)}.png", png.getvalue())
        self._events.add([summary.image("samples", pixels, dataformats="HW" if pixels.ndim == 2 else "HWC")], step)

    def text(self, name: str, text: str) -> None:
        """Log a text as a code block."""
        self._events.add([summary.text(name, "\n".join("    " + line for line in text.splitlines()))])


def _tensorboard_tag(name: str) -> str:
    """Group related metrics on one TensorBoard card: loss_group_0 becomes loss_per_group/0."""
    for prefix, card in (
        ("loss_group_", "loss_per_group/"),
        ("loss_tau_", "loss_per_timestep/"),
        ("grad_norm_", "grad_norm_per_group/"),
        ("rank_", "ranks/"),
        ("slowest_rank", "ranks/slowest"),
    ):
        if name.startswith(prefix):
            return card + name.removeprefix(prefix)
    return f"train/{name}"
