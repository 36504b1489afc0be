"""Time grids: against linspace and diffusers' shifted sigmas; how a grid meets the experts' intervals."""

import itertools
import math
from unittest.mock import patch

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from latte_flow.model.time_grids import (
    TIME_GRIDS,
    make_timesteps,
    register_time_grid,
    shifted_timesteps,
    uniform_timesteps,
)
from latte_flow.model.timestep_experts import TimestepExperts

EXPERTS = TimestepExperts(num_layers=8, num_groups=4)
TOKENS = 64


@given(st.integers(1, 2000))
def test_uniform_timesteps_are_linspace(num_steps):
    np.testing.assert_allclose(uniform_timesteps(num_steps), np.linspace(1000, 0, num_steps + 1), rtol=1e-12)


@given(st.integers(1, 60), st.integers(1, 40))
def test_a_timestep_that_is_a_boundary_is_exactly_that(num_groups, multiple):
    """tau = 1000 k / K for both, so the step that begins there is the next group's, whatever the rounding."""
    boundaries = [1000 * (num_groups - k) / num_groups for k in range(num_groups + 1)]
    experts = TimestepExperts(num_layers=num_groups, num_groups=num_groups, overlap=0.0, boundaries=boundaries)
    owners = [experts.owner(tau) for tau in uniform_timesteps(num_groups * multiple)[:-1]]
    assert owners == [k for k in range(num_groups) for _ in range(multiple)]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_timesteps_are_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[tau / 1000 for tau in uniform_timesteps(10)[:-1]])
    np.testing.assert_allclose(shifted_timesteps(10, shift), 1000 * scheduler.sigmas.numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("tokens", "shift"), [(64, 1.0), (256, 2.0), (1024, 4.0)])
def test_the_shift_follows_the_resolution_unless_it_is_given(tokens, shift):
    made = make_timesteps(EXPERTS, tokens, num_steps=40, time_grid="shifted")
    assert made == shifted_timesteps(40, shift)
    assert make_timesteps(EXPERTS, tokens, num_steps=40, time_grid="shifted", shift=1.5) == shifted_timesteps(40, 1.5)


def test_timesteps_of_a_list():
    taus = [1000.0, 800.0, 600.0, 300.0, 100.0, 0.0]
    assert make_timesteps(EXPERTS, TOKENS, timesteps=taus) == taus


@given(st.integers(4, 200), st.sampled_from(["uniform", "shifted"]), st.floats(0.7, 1.5))
def test_aligned_steps_cross_no_boundary(num_steps, grid, shift):
    options = {"num_steps": num_steps, "time_grid": grid, "shift": shift, "allow_skipped_experts": True}
    plain, taus = (make_timesteps(EXPERTS, TOKENS, align_to_experts=align, **options) for align in (False, True))
    assert len(taus) == len(plain)
    assert all(high > low for high, low in itertools.pairwise(taus))
    assert {EXPERTS.strict_interval(group)[1] for group in range(3)} <= set(taus)
    assert sum(a != b for a, b in zip(taus, plain, strict=True)) <= 3
    assert {EXPERTS.owner(tau) for tau in taus[:-1]} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps: got 0; accepted: 1 or more"),
        ({"num_steps": 3}, "num_steps: 3 steps run 3 of the 4 experts; accepted: more steps, or allow_skipped_experts"),
        ({"time_grid": "cosine"}, "time_grid: 'cosine' is unknown; accepted values: uniform, shifted"),
        ({"time_grid": "shifted", "shift": 0.0}, "shift: got 0.0; accepted: greater than 0"),
        ({"time_grid": "shifted", "shift": math.nan}, "shift: got nan; accepted: greater than 0"),
        ({"timesteps": [900, 0]}, "timesteps: got .*; accepted: numbers strictly descending from 1000 to 0"),
        ({"timesteps": [1000, 500, 500, 0]}, "timesteps: got .*strictly descending"),
        ({"timesteps": [1000]}, "timesteps: got .*strictly descending"),
        ({"num_steps": 3, "align_to_experts": True}, "align_to_experts: 3 steps have no timestep for each of the 3"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_timesteps(EXPERTS, TOKENS, **options)


def test_a_grid_is_added_from_outside():
    with patch.dict(TIME_GRIDS):

        @register_time_grid("squares")
        def squares(num_steps, shift):
            return [1000 * (1 - (i / num_steps) ** 2) for i in range(num_steps + 1)]

        taus = make_timesteps(EXPERTS, TOKENS, num_steps=10, time_grid="squares")
        assert taus[:3] == pytest.approx([1000, 990, 960])
