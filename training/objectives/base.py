"""What an objective is, the table of them, and the weighted sum that a run trains.

Every rank runs all objectives of its run in every micro-batch, in the same order, and one backward pass of their weighted sum.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar

import deepspeed
import torch
from torch import Tensor, nn

from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.tables import enter, look_up
from latte_flow.training.components import Components, Images, MetaComponents
from latte_flow.training.configs.fields import Assumptions, TrainingConfig
from latte_flow.training.data.loader import Batch, JointSamples, Samples
from latte_flow.training.distributed.batch_layout import BatchLayout
from latte_flow.training.distributed.ranks import Ranks
from latte_flow.training.errors import naming
from latte_flow.training.monitor.metrics import LossMeter, MetricsWriter

Kind = TypeVar("Kind", bound=type["Objective"])


@dataclass(frozen=True)
class RunParts:
    """What an objective of a run is built from."""

    config: TrainingConfig
    images: Images
    components: Components
    ranks: Ranks
    layout: BatchLayout
    device: torch.device


@dataclass(frozen=True)
class MetaParts:
    """What an objective is counted with: one rank's part of a run on the meta device, where tensors have no data.

    Attributes:
        components: VLM, codec and the network's configuration.
        model: this rank's part of the network.
        vlm: this rank's part of the VLM; part of the network in a Blend.
        assumed: number and length of the prompts, among others.
    """

    config: TrainingConfig
    components: MetaComponents
    model: LatteFlowModel
    vlm: nn.Module
    layout: BatchLayout
    assumed: Assumptions


@dataclass(frozen=True)
class Counts:
    """What the dry run counts of an objective on one GPU. Labels are printed.

    Attributes:
        losses: runs one micro-batch forward on the meta device and returns its losses [rows]. Its operations and what autograd
            keeps for the backward pass are counted by the dry run.
        memory: label -> bytes, beside the network, its optimizer and the activations.
        flops: label -> operations per sample, beside forward and backward.
        flops_once: label -> operations that do not recur in every step; they take no part in the estimated time.
        note: a remark on the batch.
    """

    losses: Callable[[], Tensor]
    memory: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    flops_once: dict[str, float] = field(default_factory=dict)
    note: str = ""


class Objective(ABC):
    """What a run trains for: the samples, their losses, and what is reported, drawn and counted.

    Every rank of a run constructs it, after the network and before DeepSpeed's engine, and calls its methods in the same order;
    all but ``metric_columns`` may therefore contain collectives. The network's modules must run equally often on all ranks.

    Args:
        parts: what it is built from.

    Attributes:
        samples: the training samples by global sample index; a sample must depend only on the index and the run's seed.
        metric_names: further names under which losses are reported in metrics.jsonl, beside the objective's own.
        cards: prefixes of these names -> what takes its place in TensorBoard, "card/".
    """

    samples: Samples
    metric_names: Sequence[str] = ()
    cards: ClassVar[Mapping[str, str]] = {}

    @classmethod  # noqa: B027
    def check(cls, config: TrainingConfig, model_config: LatteFlowConfig, layout: BatchLayout) -> None:
        """Reject a run that cannot be trained for this objective.

        Raises:
            UserError: names the field and what is accepted.
        """

    @classmethod
    @abstractmethod
    def trained_parameters(cls, model: LatteFlowModel) -> set[str]:
        """Return the names of the parameters that its losses reach. What no objective of a run reaches is frozen."""

    @classmethod
    @abstractmethod
    def count(cls, parts: MetaParts) -> Counts:
        """Return what the dry run counts.

        Raises:
            UserError: in the same cases as the run itself.
        """

    @abstractmethod
    def __init__(self, parts: RunParts): ...

    @abstractmethod
    def compute_losses(self, engine: deepspeed.DeepSpeedEngine, batch) -> Tensor:
        """Return the losses [rows] of a micro-batch of ``samples`` on the device. Their mean is trained."""

    def metric_columns(self, batch) -> Tensor:
        """Return the n places in ``metric_names`` under which each loss is reported, int64 [n, rows] on the batch's device."""
        return batch.sample_indices.new_empty(0, len(batch.sample_indices))

    def log(self, engine: deepspeed.DeepSpeedEngine, writer: MetricsWriter | None, step: int) -> None:  # noqa: B027
        """Log what it reports beside losses, at every logged step. Only rank 0 has a writer."""

    def draw(self, engine: deepspeed.DeepSpeedEngine, writer: MetricsWriter | None, step: int) -> None:  # noqa: B027
        """Draw samples with the averaged weights, every ``sample.every`` steps. Only rank 0 has a writer."""


OBJECTIVES: dict[str, type[Objective]] = {}
"""Name in the field ``objectives`` -> class. Open from outside: see ``register_objective``."""


def register_objective(name: str) -> Callable[[Kind], Kind]:
    """Return a decorator that adds a class to the table of objectives.

    Raises:
        ValueError: when the name is taken.
    """
    return lambda kind: enter(OBJECTIVES, name, kind)


def find_objectives(config: TrainingConfig) -> dict[str, type[Objective]]:
    """Return the objectives of a run, in the order in which they run.

    Raises:
        UserError: when one is unknown.
    """
    with naming():
        return {name: look_up(OBJECTIVES, name, "objectives") for name in sorted(config.objectives)}


def freeze_unreached(model: LatteFlowModel, kinds: Iterable[type[Objective]]) -> None:
    """Freeze the parameters that none of these objectives reaches, so that weight decay does not change them."""
    reached = set().union(*(kind.trained_parameters(model) for kind in kinds))
    for name, parameter in model.named_parameters():
        if name not in reached:
            parameter.requires_grad_(False)


class Rows(NamedTuple):
    """The losses of one objective without their graph, and what is reported of them."""

    losses: Tensor  # [rows]
    sample_indices: Tensor  # [rows] int64, global
    columns: Tensor  # [n, rows] int64: places in metric_names


class Objectives:
    """The objectives of a run and their weights.

    Args:
        parts: what they are built from.

    Attributes:
        samples: the samples of all, by name.
        meter: their losses since the last logged step.
    """

    def __init__(self, parts: RunParts):
        self.weights = parts.config.objectives
        self.parts = {name: kind(parts) for name, kind in find_objectives(parts.config).items()}
        self.samples = JointSamples({name: part.samples for name, part in self.parts.items()})
        names = {name: [f"loss_{name}", *part.metric_names] for name, part in self.parts.items()}
        self.meter = LossMeter([n for own in names.values() for n in own], parts.device, parts.ranks.data_group)
        self.cards = {prefix: card for part in self.parts.values() for prefix, card in part.cards.items()}

    def compute_losses(self, engine, batches: Mapping[str, Batch]) -> tuple[Tensor, dict[str, Rows]]:
        """Return the loss of a micro-batch, to call backward on, and its rows per objective. Collective."""
        losses = {name: part.compute_losses(engine, batches[name]) for name, part in self.parts.items()}
        rows = {
            name: Rows(losses[name].detach(), batches[name].sample_indices, part.metric_columns(batches[name]))
            for name, part in self.parts.items()
        }
        return self._weigh(losses), rows

    def record(self, trained: Mapping[str, Rows]) -> Tensor:
        """Add the losses of a step to the meter and return this rank's loss, float64."""
        first = 0
        for name, rows in trained.items():
            own = torch.zeros_like(rows.sample_indices)[None]
            self.meter.update(rows.losses, first + torch.cat([own, 1 + rows.columns]))
            first += 1 + len(self.parts[name].metric_names)
        return self._weigh({name: rows.losses.double() for name, rows in trained.items()})

    def report(self) -> dict[str, float]:
        """Return the mean losses since the last report (``loss``: NaN if there were none) and start again. Collective.

        ``loss`` is the weighted sum; with several objectives, ``loss_NAME`` is the mean of each.
        """
        means = self.meter.compute()
        own = {name: means.get(f"loss_{name}", math.nan) for name in self.parts}
        if len(own) == 1:
            means.pop(f"loss_{next(iter(own))}", None)
        return {"loss": sum(self.weights[name] * mean for name, mean in own.items()), **means}

    def losses_by_metric(self, trained: Mapping[str, Rows]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the losses and sample indices of each objective under the name of its metric."""
        alone = len(self.parts) == 1
        return {"loss" if alone else f"loss_{name}": (r.losses, r.sample_indices) for name, r in trained.items()}

    def log(self, engine, writer: MetricsWriter | None, step: int) -> None:
        """Log what each reports beside losses. Collective."""
        for part in self.parts.values():
            part.log(engine, writer, step)

    def draw(self, engine, writer: MetricsWriter | None, step: int) -> None:
        """Draw each one's samples. Collective."""
        for part in self.parts.values():
            part.draw(engine, writer, step)

    def _weigh(self, losses: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * values.mean() for name, values in losses.items()]).sum()


def join_rows(micro_batches: Sequence[Mapping[str, Rows]]) -> dict[str, Rows]:
    """Return the rows of all micro-batches of a step."""
    return {
        name: Rows(*(torch.cat(parts, dim=-1) for parts in zip(*(m[name] for m in micro_batches), strict=True)))
        for name in micro_batches[0]
    }
