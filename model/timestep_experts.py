"""Layerwise timestep experts (paper section 3 and Appendix B): which layers own which timesteps.

The L layers are split into K groups of M = L / K consecutive layers, and the timesteps (0, 1000] into K intervals. Group 0
owns the noisy end. Inference is strict: each timestep has exactly one group. Training intervals overlap at the inner
boundaries, so that timesteps near a boundary are seen by both neighbours.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latte_flow.model.errors import ArgumentError
from latte_flow.model.flow_matching import NUM_TRAIN_TIMESTEPS


def uniform_boundaries(num_groups: int) -> list[float]:
    """Return the K + 1 descending boundaries linspace(1000, 1, K + 1) of the paper, the last one moved to 0.

    The paper's grid of integer timesteps ends at 1; with a continuous tau the last interval reaches down to the data, tau = 0.
    """
    step = (NUM_TRAIN_TIMESTEPS - 1) / num_groups
    inner = [NUM_TRAIN_TIMESTEPS - step * k for k in range(1, num_groups)]
    return [float(NUM_TRAIN_TIMESTEPS), *inner, 0.0]


@dataclass(frozen=True)
class TimestepExperts:
    """The partition of layers and timesteps into K groups.

    Args:
        num_layers: L, the number of layers to split.
        num_groups: K; must divide L. K = 1 is the vanilla model: one group owns everything.
        overlap: width in timesteps of the band around each inner boundary that both neighbours train on (paper: 100).
        boundaries: K + 1 timesteps, strictly descending from 1000 to 0; None for the paper's uniform ones.

    Raises:
        ArgumentError: when K does not divide L, or the boundaries or the overlap do not make K intervals.
    """

    num_layers: int
    num_groups: int
    overlap: float = 100.0
    boundaries: Sequence[float] | None = None
    _bounds: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.num_groups < 1 or self.num_layers % self.num_groups:
            divisors = [k for k in range(1, self.num_layers + 1) if self.num_layers % k == 0]
            raise ArgumentError(
                f"num_groups: {self.num_groups} does not divide the {self.num_layers} layers of the model; "
                f"accepted values: {', '.join(map(str, divisors))}"
            )
        given = uniform_boundaries(self.num_groups) if self.boundaries is None else self.boundaries
        object.__setattr__(self, "_bounds", tuple(float(b) for b in given))
        object.__setattr__(self, "boundaries", self._bounds)
        bounds = self._bounds
        expected = f"{self.num_groups + 1} numbers strictly descending from {NUM_TRAIN_TIMESTEPS} to 0"
        if len(bounds) != self.num_groups + 1 or bounds[0] != NUM_TRAIN_TIMESTEPS or bounds[-1] != 0:
            raise ArgumentError(f"timestep_boundaries: got {list(bounds)}; accepted: {expected}")
        if not all(high > low for high, low in itertools.pairwise(bounds)):  # a NaN is not descending either
            raise ArgumentError(f"timestep_boundaries: got {list(bounds)}; accepted: {expected}")
        if not 0 <= self.overlap <= NUM_TRAIN_TIMESTEPS:
            raise ArgumentError(f"timestep_overlap: got {self.overlap}; accepted: 0 to {NUM_TRAIN_TIMESTEPS} timesteps")

    @property
    def group_size(self) -> int:
        """M, the number of layers that run at one sampling step."""
        return self.num_layers // self.num_groups

    def layers(self, group: int) -> range:
        """Return the layer indices of a group: M consecutive ones, group 0 the first."""
        return range(group * self.group_size, (group + 1) * self.group_size)

    def group_of_layer(self, layer: int) -> int:
        """Return the group that a layer belongs to."""
        return layer // self.group_size

    def is_first_in_group(self, layer: int) -> bool:
        """Return whether a layer opens its group; such a layer has no predecessor to take a residual map from."""
        return layer % self.group_size == 0

    def strict_interval(self, group: int) -> tuple[float, float]:
        """Return (high, low): at inference the group owns the timesteps low < tau <= high (the last group also tau = 0)."""
        return self._bounds[group], self._bounds[group + 1]

    def training_interval(self, group: int) -> tuple[float, float]:
        """Return (high, low): the strict interval widened by overlap / 2 at each inner boundary (Appendix B)."""
        high, low = self.strict_interval(group)
        return (
            min(high + self.overlap / 2, NUM_TRAIN_TIMESTEPS) if group > 0 else high,
            max(low - self.overlap / 2, 0.0) if group < self.num_groups - 1 else low,
        )

    def owner(self, tau: float) -> int:
        """Return the one group that runs at timestep tau when sampling.

        Raises:
            ArgumentError: when tau lies outside [0, 1000].
        """
        if not 0 <= tau <= NUM_TRAIN_TIMESTEPS:
            raise ArgumentError(f"tau: got {tau}; accepted: a timestep in [0, {NUM_TRAIN_TIMESTEPS}]")
        return next(k for k in range(self.num_groups) if tau > self._bounds[k + 1] or k == self.num_groups - 1)

    def draw_timesteps(self, uniform: Tensor, group: Tensor) -> Tensor:
        """Map uniform draws to timesteps inside each sample's training interval (the stratified draw of section 3).

        Args:
            uniform: draws in [0, 1), [B].
            group: the group of each sample, integers, [B].

        Returns:
            tau in [low, high], [B], float32.
        """
        intervals = torch.tensor([self.training_interval(k) for k in range(self.num_groups)], device=uniform.device)
        high, low = intervals[group].unbind(-1)
        return high - (high - low) * uniform.float()
