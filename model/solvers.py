"""Solvers of dx = v dt from noise (tau = 1000, t = 0) to data (tau = 0, t = 1), in a table that is open from outside.

``integrate`` runs one along a grid of timesteps. It knows nothing of networks.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from latte_flow.model.errors import ArgumentError
from latte_flow.model.flow_matching import NUM_TRAIN_TIMESTEPS
from latte_flow.model.tables import Entry, enter, look_up


@dataclass(frozen=True)
class Step:
    """What a solver knows of one step.

    Attributes:
        tau: the timestep at its start.
        next_tau: the timestep at its end, smaller.
        velocity: (x, tau) -> the velocity of the group that owns this step. Every evaluation of a step is that group's.
        restarts: whether another group ran the step before, or none: velocities jump there, so a history must not cross it.
        noise: draws N(0, I) of x's shape for this step; calling it again draws the same.
    """

    tau: float
    next_tau: float
    velocity: Callable[[Tensor, float], Tensor]
    restarts: bool
    noise: Callable[[], Tensor]

    @property
    def time(self) -> float:
        """t = 1 - tau / 1000 at its start."""
        return 1 - self.tau / NUM_TRAIN_TIMESTEPS

    @property
    def next_time(self) -> float:
        """t at its end."""
        return 1 - self.next_tau / NUM_TRAIN_TIMESTEPS

    @property
    def size(self) -> float:
        """h = next_time - time."""
        return (self.tau - self.next_tau) / NUM_TRAIN_TIMESTEPS


Solver = Callable[[Tensor, Step], Tensor]
"""(x, step) -> x at the end of the step. One object integrates one batch, so it may keep a history."""

SOLVERS: dict[str, Callable[[], Solver]] = {}
"""Name -> what makes a new solver."""


def register_solver(name: str) -> Callable[[Entry], Entry]:
    """Enter a solver into the table: a class or function without arguments that returns a ``Solver``.

    Raises:
        ArgumentError: when the name is taken.
    """
    return partial(enter, SOLVERS, name)


@register_solver("euler")
def euler() -> Solver:
    """First order, one evaluation per step (the paper's)."""
    return lambda x, step: x + step.size * step.velocity(x, step.tau)


@register_solver("heun")
def heun() -> Solver:
    """Second order, two evaluations per step: the trapezoidal rule."""

    def advance(x: Tensor, step: Step) -> Tensor:
        slope = step.velocity(x, step.tau)
        ahead = step.velocity(x + step.size * slope, step.next_tau)
        return x + step.size * (slope + ahead) / 2

    return advance


@register_solver("ab2")
class AdamsBashforth2:
    """Second order, one evaluation per step: the velocity is extrapolated from this step's and the one before."""

    def __init__(self):
        self._before: tuple[Tensor, float] | None = None

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        velocity = slope = step.velocity(x, step.tau)
        if self._before is not None and not step.restarts:
            before, size = self._before
            slope = velocity + (velocity - before) * (step.size / (2 * size))
        self._before = velocity, step.size
        return x + step.size * slope


@register_solver("dpmpp")
class DPMSolverPlusPlus2M:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Algorithm 2), one evaluation per step.

    It extrapolates the predicted data D = x + (1 - t) v in the half log-SNR, lambda = log(t / (1 - t)). Along this flow its first
    order is Euler's, which also takes the steps where lambda is infinite: the first and the last.
    """

    def __init__(self):
        self._before: tuple[Tensor, float] | None = None

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        data = predicted = x + (1 - step.time) * step.velocity(x, step.tau)
        size = _log_snr(step.next_time) - _log_snr(step.time)
        if self._before is not None and not step.restarts and math.isfinite(size + self._before[1]):
            before, size_before = self._before
            predicted = data + (data - before) * (size / (2 * size_before))
        self._before = data, size
        return x + step.size / (1 - step.time) * (predicted - x)


def _log_snr(time: float) -> float:
    return math.inf if time >= 1 else -math.inf if time <= 0 else math.log(time / (1 - time))


@register_solver("sde")
def stochastic_euler() -> Solver:
    """Euler-Maruyama on dx = [v - (x - t v)] dt + sqrt(2 (1 - t)) dW, one evaluation per step.

    The score of x_t = t x_1 + (1 - t) x_0 is -E[x_0 | x_t] / (1 - t) with E[x_0 | x_t] = x - t v, so that noise of this schedule,
    which vanishes at the data, leaves every marginal of the flow as it is.
    """

    def advance(x: Tensor, step: Step) -> Tensor:
        velocity = step.velocity(x, step.tau)
        drift = velocity - (x - step.time * velocity)
        return x + step.size * drift + math.sqrt(2 * (1 - step.time) * step.size) * step.noise()

    return advance


def integrate(
    velocity: Callable[..., Tensor],
    x: Tensor,
    timesteps: Sequence[float],
    solver: str = "euler",
    *,
    owner: Callable[[float], int] = lambda tau: 0,
    noise: Callable[[int], Tensor] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Tensor:
    """Integrate dx/dt = velocity along a grid of timesteps, t = 1 - tau / 1000.

    Args:
        velocity: (x, tau, group=k) -> the velocity of group k; tau is a Python number, so that choosing an expert needs no
            device read.
        x: the state at timesteps[0].
        timesteps: the grid, descending.
        solver: a key of ``SOLVERS``.
        owner: tau -> the group that runs the step that begins there.
        noise: index of a step -> N(0, I) of x's shape, for solvers that draw noise.
        progress: wraps the iterable of steps, e.g. tqdm.

    Returns:
        The state at timesteps[-1].

    Raises:
        ArgumentError: when the solver is unknown, or draws noise and gets none.
    """
    advance, group_before = look_up(SOLVERS, solver, "solver")(), None
    for index, (tau, next_tau) in enumerate(progress(list(itertools.pairwise(timesteps)))):
        group = owner(tau)
        step = Step(
            tau=tau,
            next_tau=next_tau,
            velocity=partial(velocity, group=group),
            restarts=group != group_before,
            noise=partial(_draw, noise, index, solver),
        )
        x, group_before = advance(x, step), group
    return x


def _draw(noise: Callable[[int], Tensor] | None, index: int, solver: str) -> Tensor:
    if noise is None:
        raise ArgumentError(
            f"solver: {solver} draws noise in every step and needs seeds; accepted: seed, instead of latents or a generator"
        )
    return noise(index)
