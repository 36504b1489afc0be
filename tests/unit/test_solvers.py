"""Solvers on a flow between normal distributions, whose map is known, and against diffusers' DPM-Solver++."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DPMSolverMultistepScheduler

from latte_flow.model.solvers import SOLVERS, integrate, register_solver
from latte_flow.model.time_grids import shifted_timesteps, uniform_timesteps

MEAN, STD = 2.0, 0.3
EVALUATIONS = {"euler": 1, "heun": 2, "ab2": 1, "dpmpp": 1, "sde": 1}


def gaussian_velocity(x: torch.Tensor, tau: float, group: int = 0) -> torch.Tensor:
    """E[x_1 - x_0 | x_t = x] of x_t = t x_1 + (1 - t) x_0 with independent x_0 ~ N(0, 1), x_1 ~ N(MEAN, STD^2).

    x_1 - x_0 and x_t are jointly normal: the conditional mean is linear in x.
    """
    t = 1 - tau / 1000
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def distribution(tau: float) -> tuple[float, float]:
    """Mean and standard deviation of x_t."""
    t = 1 - tau / 1000
    return t * MEAN, math.hypot(t * STD, 1 - t)


def error(solver: str, timesteps: list[float], **options) -> float:
    """The largest distance from the exact flow map, which keeps how many standard deviations a point is from the mean."""
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    (mean, std), (mean_after, std_after) = distribution(timesteps[0]), distribution(timesteps[-1])
    end = integrate(gaussian_velocity, mean + std * x, timesteps, solver, **options)
    return (end - (mean_after + std_after * x)).abs().max().item()


def order(solver: str, grid, **options) -> float:
    """The measured order of convergence."""
    steps = np.array([160, 320, 640, 1280])
    errors = np.array([error(solver, grid(n), **options) for n in steps])
    return -scipy.stats.linregress(np.log(steps), np.log(errors)).slope


def inner(num_steps: int) -> list[float]:
    """Without the ends, where the steps of DPM-Solver++ are infinite in lambda: at tau = 1000 even fine ones stay large in it."""
    return [900 - 800 * i / num_steps for i in range(num_steps + 1)]


GRIDS = {"inner": inner, "uniform": uniform_timesteps, "shifted": lambda n: shifted_timesteps(n, 3.0)}
ORDERS = {(solver, grid): (2, 1)[solver == "euler"] for solver in ("euler", "heun", "ab2") for grid in GRIDS}
ORDERS |= {("dpmpp", "inner"): 2, ("dpmpp", "uniform"): 1.77, ("dpmpp", "shifted"): 1.59}


@pytest.mark.parametrize(("solver", "grid"), ORDERS)
class TestConvergence:
    def test_has_its_order(self, solver, grid):
        assert order(solver, GRIDS[grid]) == pytest.approx(ORDERS[solver, grid], abs=0.08)
        assert error(solver, GRIDS[grid](1280)) < (1e-2 if solver == "euler" else 3e-4)

    def test_has_its_order_where_the_history_is_restarted(self, solver, grid):
        """Four groups, four restarts, however many steps."""
        measured = order(solver, GRIDS[grid], owner=lambda tau: min(int((1000 - tau) / 250), 3))
        assert measured == pytest.approx(ORDERS[solver, grid], abs=0.1)


@pytest.mark.parametrize("solver", ["heun", "ab2", "dpmpp"])
def test_forty_steps_are_better_than_eulers(solver):
    """What the paper's number of steps costs in accuracy on this flow."""
    assert error(solver, uniform_timesteps(40)) < error("euler", uniform_timesteps(40)) / 4 < 0.02


class TestRestarts:
    """The velocity jumps from 1 to 5 at tau = 500, where another group takes over: exact for one that restarts."""

    @pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
    def test_no_history_crosses_a_boundary(self, solver):
        seen = []

        def velocity(x, tau, group):
            seen.append(group)
            return torch.full_like(x, (1.0, 5.0)[group])

        x = integrate(velocity, torch.zeros(1), uniform_timesteps(8), solver, owner=lambda tau: int(tau <= 500))
        assert x.item() == pytest.approx(0.5 * 1 + 0.5 * 5)
        assert seen == sorted(seen)


def test_dpmpp_is_diffusers():
    """DPM-Solver++(2M) of diffusers, told the same noise levels, the last step of lower order as here."""
    timesteps = [999.0, 960.0, 850.0, 700.0, 555.0, 300.0, 120.0, 0.0]
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True,
        lower_order_final=True, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(len(timesteps) - 1)
    scheduler.sigmas = torch.tensor(timesteps, dtype=torch.float64) / 1000
    start = torch.linspace(-3, 3, 31, dtype=torch.float64)
    theirs = start
    for tau, timestep in zip(timesteps[:-1], scheduler.timesteps, strict=True):
        theirs = scheduler.step(-gaussian_velocity(theirs, tau), timestep, theirs).prev_sample
    ours = integrate(gaussian_velocity, start, timesteps, "dpmpp")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert (ours - integrate(gaussian_velocity, start, timesteps)).abs().max() > 1e-2


def test_the_stochastic_solver_ends_in_the_data_distribution():
    rng = np.random.default_rng(0)
    start = torch.from_numpy(rng.standard_normal(20_000))
    noises = {i: torch.from_numpy(rng.standard_normal(20_000)) for i in range(400)}
    end = integrate(gaussian_velocity, start, uniform_timesteps(400), "sde", noise=noises.get)
    assert scipy.stats.kstest(((end - MEAN) / STD).numpy(), "norm").statistic < 0.02
    assert abs(np.corrcoef(start, end)[0, 1]) < 0.9  # the flow's own map has 1


@pytest.mark.parametrize("solver", EVALUATIONS)
class TestEverySolver:
    def run(self, velocity, x, timesteps, solver):
        return integrate(velocity, x, timesteps, solver, noise=lambda index: torch.zeros_like(x))

    def test_number_and_places_of_evaluations(self, solver):
        seen = []
        self.run(lambda x, tau, group: seen.append(tau) or x, torch.ones(1), uniform_timesteps(5), solver)
        assert len(seen) == 5 * EVALUATIONS[solver]
        assert seen[:: EVALUATIONS[solver]] == [1000, 800, 600, 400, 200]
        if EVALUATIONS[solver] == 2:
            assert seen[1::2] == [800, 600, 400, 200, 0]

    def test_leaves_its_input_alone(self, solver):
        x = torch.ones(3)
        self.run(lambda x, tau, group: x, x, uniform_timesteps(3), solver)
        assert torch.equal(x, torch.ones(3))

    def test_starts_afresh_for_each_batch(self, solver):
        once, twice = (self.run(gaussian_velocity, torch.ones(3), uniform_timesteps(6), solver) for _ in range(2))
        assert torch.equal(once, twice)


@pytest.mark.parametrize(("solver", "factor"), [("euler", 1.1), ("heun", 1.105)])
def test_on_exponential_growth(solver, factor):
    """dx/dt = x: each step multiplies by 1 + h, or by 1 + h + h^2 / 2."""
    x = integrate(lambda x, tau, group: x, torch.ones(1, dtype=torch.float64), uniform_timesteps(10), solver)
    assert x.item() == pytest.approx(factor**10, rel=1e-12)


@pytest.mark.parametrize(("solver", "value"), [("euler", 0.66), ("heun", 1.0), ("ab2", 1.0)])
def test_on_an_uneven_grid(solver, value):
    """dx/dt = 2t: Euler is the left Riemann sum; Heun is exact; Adams-Bashforth is exact after its first step, of 0.1 * 0.1."""
    taus = [1000.0, 900.0, 500.0, 400.0, 0.0]
    x = integrate(lambda x, tau, group: torch.full_like(x, 2 * (1 - tau / 1000)), torch.zeros(1), taus, solver)
    assert x.item() == pytest.approx(value - 0.01 * (solver == "ab2"))


def test_a_solver_is_added_from_outside():
    with patch.dict(SOLVERS):

        @register_solver("half")
        def half():
            return lambda x, step: x + step.size / 2 * step.velocity(x, step.tau)

        x = integrate(lambda x, tau, group: torch.ones_like(x), torch.zeros(1), uniform_timesteps(4), "half")
        assert x.item() == pytest.approx(0.5)
        with pytest.raises(
            ValueError, match="'half' is taken; accepted: another name than euler, heun, ab2, dpmpp, sde, half"
        ):
            register_solver("half")(half)


def test_an_unknown_solver_names_the_accepted_ones():
    with pytest.raises(ValueError, match="solver: 'rk4' is unknown; accepted values: euler, heun, ab2, dpmpp, sde"):
        integrate(gaussian_velocity, torch.zeros(1), [1000.0, 0.0], "rk4")
