"""Time grids: the timesteps of a sampling run, in a table that is open from outside, and how they meet the experts' intervals."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

from latte_flow.model.errors import ArgumentError
from latte_flow.model.flow_matching import NUM_TRAIN_TIMESTEPS
from latte_flow.model.tables import Entry, enter, look_up
from latte_flow.model.timestep_experts import TimestepExperts

TimeGrid = Callable[[int, float], list[float]]
TIME_GRIDS: dict[str, TimeGrid] = {}
"""Name -> (num_steps, shift) -> num_steps + 1 timesteps tau, descending from 1000 to 0."""


def register_time_grid(name: str) -> Callable[[Entry], Entry]:
    """Enter a time grid into the table.

    Raises:
        ArgumentError: when the name is taken.
    """
    return partial(enter, TIME_GRIDS, name)


@register_time_grid("uniform")
def uniform_timesteps(num_steps: int, shift: float = 1.0) -> list[float]:
    """Return equally spaced timesteps; the shift is not used.

    From integers: 1000 (n - i) / n is exact where it is a boundary between experts, 1000 (1 - i / n) may be beside it.

    Raises:
        ArgumentError: when num_steps is not positive.
    """
    if num_steps < 1:
        raise ArgumentError(f"num_steps: got {num_steps}; accepted: 1 or more")
    return [NUM_TRAIN_TIMESTEPS * (num_steps - i) / num_steps for i in range(num_steps + 1)]


@register_time_grid("shifted")
def shifted_timesteps(num_steps: int, shift: float) -> list[float]:
    """Return timesteps moved towards the noise: sigma -> shift sigma / (1 + (shift - 1) sigma) (Esser et al., arXiv 2403.03206).

    Raises:
        ArgumentError: when num_steps or the shift is not positive.
    """
    if not 0 < shift < math.inf:
        raise ArgumentError(f"shift: got {shift}; accepted: greater than 0")
    sigmas = [tau / NUM_TRAIN_TIMESTEPS for tau in uniform_timesteps(num_steps)]
    inner = [NUM_TRAIN_TIMESTEPS * shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas[1:-1]]
    return [float(NUM_TRAIN_TIMESTEPS), *inner, 0.0]


BASE_IMAGE_TOKENS = 64
"""The paper's 8 x 8 tokens, at which the shift that follows the resolution is 1."""


def make_timesteps(
    experts: TimestepExperts,
    num_image_tokens: int,
    *,
    num_steps: int = 40,
    time_grid: str = "uniform",
    shift: float | None = None,
    timesteps: Sequence[float] | None = None,
    align_to_experts: bool = False,
    allow_skipped_experts: bool = False,
) -> list[float]:
    """Return the timesteps of a sampling run, n + 1 of them, descending from 1000 to 0.

    Args:
        experts: which group owns which timestep.
        num_image_tokens: N.
        num_steps: n (paper: 40).
        time_grid: a key of ``TIME_GRIDS``.
        shift: of the grid ``shifted``; None for sqrt(N / 64), which keeps the signal-to-noise ratio of an image's mean over
            resolutions.
        timesteps: the timesteps themselves, in place of a grid.
        align_to_experts: whether to move the nearest timestep onto each boundary between experts: no step crosses one then.
        allow_skipped_experts: whether some groups may run no step at all.

    Raises:
        ArgumentError: when an argument is invalid, or a group would be skipped; the message names the argument.
    """
    if timesteps is None:
        shift = math.sqrt(num_image_tokens / BASE_IMAGE_TOKENS) if shift is None else shift
        taus = look_up(TIME_GRIDS, time_grid, "time_grid")(num_steps, shift)
    else:
        taus = [float(tau) for tau in timesteps]
    ends = len(taus) > 1 and (taus[0], taus[-1]) == (NUM_TRAIN_TIMESTEPS, 0)
    if not ends or not all(high > low for high, low in itertools.pairwise(taus)):
        raise ArgumentError(
            f"timesteps: got {taus}; accepted: numbers strictly descending from {NUM_TRAIN_TIMESTEPS} to 0"
        )
    if align_to_experts:
        taus = _align(taus, [experts.strict_interval(group)[1] for group in range(experts.num_groups - 1)])
    running = {experts.owner(tau) for tau in taus[:-1]}
    if len(running) < experts.num_groups and not allow_skipped_experts:
        raise ArgumentError(
            f"num_steps: {len(taus) - 1} steps run {len(running)} of the {experts.num_groups} experts; accepted: more steps, or "
            "allow_skipped_experts"
        )
    return taus


def _align(taus: list[float], boundaries: Sequence[float]) -> list[float]:
    """Move the nearest inner timestep onto each boundary."""
    inner = range(1, len(taus) - 1)
    nearest = [min(inner, key=lambda i: abs(taus[i] - boundary), default=0) for boundary in boundaries]
    if len(set(nearest) - {0}) < len(boundaries):
        raise ArgumentError(
            f"align_to_experts: {len(taus) - 1} steps have no timestep for each of the {len(boundaries)} boundaries between "
            "experts; accepted: more steps"
        )
    aligned = list(taus)
    for index, boundary in zip(nearest, boundaries, strict=True):
        aligned[index] = boundary
    return aligned
