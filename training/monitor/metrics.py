"""Metrics of a run (losses, gradient norms, throughput), logged to metrics.jsonl and TensorBoard."""

import json
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import summary

from latte_flow.model.images import to_pil
from latte_flow.training.checkpoint.manifest import step_name
from latte_flow.training.distributed.collectives import print_once
from latte_flow.training.distributed.zero import gradient_norms
from latte_flow.training.monitor.logs import EventFile, LogFile, replace_file, skip_failures

_POSITIVE_BINS = 1e-12 * 1.1 ** np.arange(774)
HISTOGRAM_BINS = np.concatenate([-_POSITIVE_BINS[::-1], [0], _POSITIVE_BINS])
"""TensorBoard's bins, up to 1e20."""
CARDS = {"grad_norm_": "grad_norm_per_group/", "rank_": "ranks/", "slowest_rank": "ranks/slowest"}
"""Prefix of a metric's name -> what takes its place in TensorBoard, which shows what is before the slash on one card."""


class LossMeter:
    """Sums losses on the device between two logged steps, each under one or more names. No host synchronisation.

    The sums are local to this rank; ``compute`` reduces them over the data-parallel group.

    Args:
        names: name of each column, all different.
        device: device of the losses.
        group: the data-parallel group of this rank; None for all ranks.
    """

    def __init__(self, names: Sequence[str], device: torch.device, group: dist.ProcessGroup | None = None):
        self.names, self.group = list(names), group
        # Rows: sum, count. float64, so that the order of additions does not matter.
        self.totals = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)

    def update(self, losses: Tensor, columns: Tensor) -> None:
        """Add losses [rows], each to its n columns [n, rows]."""
        values = losses.detach().double().repeat(len(columns))
        self.totals[0].index_add_(0, columns.flatten(), values)
        self.totals[1].index_add_(0, columns.flatten(), torch.ones_like(values))

    def compute(self) -> dict[str, float]:
        """Return the mean losses over all ranks since the last call, of the names that have any, and reset. Collective."""
        totals = self.totals.clone()
        if dist.is_initialized():
            dist.all_reduce(totals, group=self.group)
        self.totals.zero_()
        sums, counts = totals.tolist()
        return {name: sums[i] / counts[i] for i, name in enumerate(self.names) if counts[i]}

    def state_dict(self) -> dict:
        """Return the sums of all ranks, so that a run resumed between two logged steps reports the same means. Collective."""
        gathered = [torch.zeros_like(self.totals) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, self.totals, self.group)
        return {"names": self.names, "totals": [totals.tolist() for totals in gathered]}

    def load_state_dict(self, state: dict | list) -> None:
        """Restore this rank's sums by name and print which of them have no column here.

        If the number of ranks changed, rank 0 takes all of them. Older versions saved a list without names, which is dropped.
        """
        if isinstance(state, list):
            if torch.tensor(state).any():
                print_once("metrics: the checkpoint's losses since its last logged step have no names and are dropped")
            return
        totals = torch.tensor(state["totals"], dtype=torch.float64)  # [ranks, 2, columns]
        counts = dict(zip(state["names"], totals[:, 1].sum(0).tolist(), strict=True))
        if dropped := [name for name, count in counts.items() if count and name not in self.names]:
            print_once(f"metrics: {', '.join(dropped)} since the last logged step are dropped: no longer reported")
        if len(totals) == dist.get_world_size(self.group):
            mine = totals[dist.get_rank(self.group)]
        else:
            mine = totals.sum(0) * (dist.get_rank(self.group) == 0)
        for name, column in zip(state["names"], mine.T, strict=True):
            if name in self.names:
                self.totals[:, self.names.index(name)] = column.to(self.totals.device)


def labelled_gradient_norms(engine, group_labels: list[str]) -> dict[str, Tensor]:
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
        cards: prefix of a metric's name -> what takes its place in TensorBoard, beside CARDS.
    """

    def __init__(self, output_dir: Path, resumed_step: int, cards: Mapping[str, str] | None = None):
        self.path = output_dir / "metrics.jsonl"
        self._cards = CARDS | dict(cards or {})
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
        self._events.add([summary.scalar(self._tag(name), value) for name, value in numbers.items()], step)

    def distributions(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Log values of any shape under a name, "card/name": their distribution, and their mean under "card_mean/name"."""
        summaries = []
        for name, tensor in values.items():
            card, _, rest = name.partition("/")
            summaries.append(summary.scalar(f"{card}_mean/{rest}", tensor.mean().item()))
            summaries.append(summary.histogram(name, tensor.flatten().cpu().numpy(), HISTOGRAM_BINS))
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

    def _tag(self, name: str) -> str:
        """Group related metrics on one TensorBoard card."""
        for prefix, card in self._cards.items():
            if name.startswith(prefix):
                return card + name.removeprefix(prefix)
        return f"train/{name}"
