"""Timestep experts: the paper's intervals, one owner for every timestep, stratified draws."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from latte_flow.model.randomness import Stream, uniform
from latte_flow.model.timestep_experts import TimestepExperts, uniform_boundaries

PAPER_STRICT = [(1000, 750.25), (750.25, 500.5), (500.5, 250.75), (250.75, 0)]
PAPER_TRAINING = [(1000, 700.25), (800.25, 450.5), (550.5, 200.75), (300.75, 0)]
SAMPLING_STEPS = [1000 * (1 - i / 40) for i in range(40)]


@st.composite
def experts(draw) -> TimestepExperts:
    """Any K that divides L, with uniform or any other descending boundaries and any overlap."""
    num_groups = draw(st.integers(1, 12))
    num_layers = num_groups * draw(st.integers(1, 7))
    inner = draw(
        st.none()
        | st.lists(
            st.floats(0, 1000, exclude_min=True, exclude_max=True),
            min_size=num_groups - 1,
            max_size=num_groups - 1,
            unique=True,
        )
    )
    boundaries = None if inner is None else [1000, *sorted(inner, reverse=True), 0]
    return TimestepExperts(num_layers, num_groups, overlap=draw(st.floats(0, 1000)), boundaries=boundaries)


class TestPaper:
    def test_intervals_of_four_groups(self):
        four = TimestepExperts(28, 4)
        assert [four.strict_interval(k) for k in range(4)] == PAPER_STRICT
        assert [four.training_interval(k) for k in range(4)] == PAPER_TRAINING

    @pytest.mark.parametrize("num_groups", [1, 2, 4, 7, 14, 28])
    def test_inner_boundaries_are_linspace_from_1000_to_1(self, num_groups):
        boundaries = uniform_boundaries(num_groups)
        np.testing.assert_allclose(boundaries[:-1], np.linspace(1000, 1, num_groups + 1)[:-1], rtol=1e-14)
        assert boundaries[0] == 1000
        assert boundaries[-1] == 0

    def test_forty_uniform_steps_are_ten_for_each_group(self):
        owners = [TimestepExperts(28, 4).owner(tau) for tau in SAMPLING_STEPS]
        assert owners == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10

    def test_seven_layers_run_at_a_step(self):
        four = TimestepExperts(28, 4)
        assert four.group_size == 7
        assert [list(four.layers(k)) for k in range(4)] == [
            [0, 1, 2, 3, 4, 5, 6],
            [7, 8, 9, 10, 11, 12, 13],
            [14, 15, 16, 17, 18, 19, 20],
            [21, 22, 23, 24, 25, 26, 27],
        ]
        assert [layer for layer in range(28) if four.is_first_in_group(layer)] == [0, 7, 14, 21]

    @pytest.mark.parametrize(("num_groups", "size"), [(7, 4), (4, 7), (2, 14)])
    def test_group_sizes_of_the_ablation(self, num_groups, size):
        assert TimestepExperts(28, num_groups).group_size == size

    def test_one_group_is_the_vanilla_model(self):
        vanilla = TimestepExperts(28, 1)
        assert vanilla.strict_interval(0) == vanilla.training_interval(0) == (1000, 0)
        assert list(vanilla.layers(0)) == list(range(28))
        assert {vanilla.owner(tau) for tau in [*SAMPLING_STEPS, 0]} == {0}


class TestOwner:
    @given(experts(), st.floats(0, 1000))
    def test_every_timestep_has_exactly_one_owner(self, experts, tau):
        """The group whose strict interval (low, high] holds tau; tau = 0, the data, belongs to the last."""
        holders = [k for k, (high, low) in enumerate(map(experts.strict_interval, range(experts.num_groups)))
                   if low < tau <= high or tau == low == 0]  # fmt: skip
        assert holders == [experts.owner(tau)]

    @given(experts())
    def test_a_boundary_belongs_to_the_less_noisy_group(self, experts):
        assert [experts.owner(high) for high in experts.boundaries[:-1]] == list(range(experts.num_groups))
        assert experts.owner(0) == experts.num_groups - 1

    @given(experts(), st.floats(0, 1000))
    def test_the_owner_has_trained_on_its_timesteps(self, experts, tau):
        high, low = experts.training_interval(experts.owner(tau))
        assert low <= tau <= high

    @pytest.mark.parametrize("tau", [-1e-9, 1000.0001, float("nan"), float("inf")])
    def test_timesteps_outside_the_flow_have_none(self, tau):
        with pytest.raises(ValueError, match=r"tau: got .*\[0, 1000\]"):
            TimestepExperts(28, 4).owner(tau)


class TestPartition:
    @given(experts())
    def test_layers_are_split_into_consecutive_groups_of_one_size(self, experts):
        groups = [list(experts.layers(k)) for k in range(experts.num_groups)]
        assert [layer for group in groups for layer in group] == list(range(experts.num_layers))
        assert {len(group) for group in groups} == {experts.group_size}
        for k, group in enumerate(groups):
            assert {experts.group_of_layer(layer) for layer in group} == {k}
            assert [experts.is_first_in_group(layer) for layer in group] == [True] + [False] * (len(group) - 1)

    @given(experts(), st.floats(0, 1000))
    def test_a_group_trains_on_timesteps_up_to_half_the_overlap_away(self, experts, tau):
        for k in range(experts.num_groups):
            high, low = experts.strict_interval(k)
            distance = max(low - tau, tau - high, 0)
            wide_high, wide_low = experts.training_interval(k)
            assert 1000 >= wide_high >= high > low >= wide_low >= 0
            if abs(distance - experts.overlap / 2) > 1e-9:  # at the end itself rounding may decide either way
                assert (wide_low <= tau <= wide_high) == (distance < experts.overlap / 2 or distance == 0)

    def test_explicit_boundaries(self):
        uneven = TimestepExperts(12, 3, overlap=40, boundaries=[1000, 900, 100, 0])
        assert [uneven.strict_interval(k) for k in range(3)] == [(1000, 900), (900, 100), (100, 0)]
        assert [uneven.training_interval(k) for k in range(3)] == [(1000, 880), (920, 80), (120, 0)]
        assert [uneven.owner(tau) for tau in (900.5, 900, 100.5, 100)] == [0, 1, 1, 2]

    def test_no_overlap_trains_on_the_strict_intervals(self):
        strict = TimestepExperts(28, 4, overlap=0)
        assert [strict.training_interval(k) for k in range(4)] == PAPER_STRICT


class TestErrors:
    @pytest.mark.parametrize("num_groups", [-4, 0, 3, 5, 8, 29, 56])
    def test_a_number_of_groups_that_does_not_divide_the_layers(self, num_groups):
        with pytest.raises(ValueError, match=rf"num_groups: {num_groups} .*accepted values: 1, 2, 4, 7, 14, 28"):
            TimestepExperts(28, num_groups)

    @pytest.mark.parametrize(
        "boundaries",
        [
            [1000, 0],  # too few
            [1000, 800, 500, 200, 100, 0],  # too many
            [1000, 750, 500, 250, 1],  # does not reach the data
            [999, 750, 500, 250, 0],  # does not start at the noise
            [0, 250, 500, 750, 1000],  # ascending
            [1000, 500, 500, 250, 0],  # an empty interval
            [1000, 250, 500, 750, 0],  # not descending inside
            [1000, 750, float("nan"), 250, 0],
            [1000, 1001, 500, 250, 0],
        ],
    )
    def test_boundaries_that_do_not_make_four_intervals(self, boundaries):
        with pytest.raises(ValueError, match=r"timestep_boundaries: .*5 numbers strictly descending from 1000 to 0"):
            TimestepExperts(28, 4, boundaries=boundaries)

    @pytest.mark.parametrize("overlap", [-1, 1000.5, float("nan"), float("inf")])
    def test_an_overlap_that_is_no_width(self, overlap):
        with pytest.raises(ValueError, match=r"timestep_overlap: .*accepted: 0 to 1000"):
            TimestepExperts(28, 4, overlap=overlap)


class TestDrawTimesteps:
    @pytest.mark.parametrize("group", range(4))
    def test_uniform_over_the_training_interval(self, group):
        """Kolmogorov-Smirnov against the paper's interval; against the strict one it must see the difference."""
        draws = torch.tensor([uniform(0, Stream.TIMESTEP, index) for index in range(4000)])
        tau = TimestepExperts(28, 4).draw_timesteps(draws, torch.full((4000,), group))
        for (high, low), equal in ((PAPER_TRAINING[group], True), (PAPER_STRICT[group], False)):
            result = scipy.stats.kstest(tau.numpy(), scipy.stats.uniform(low, high - low).cdf)
            assert result.pvalue > 0.01 if equal else result.pvalue < 1e-9

    def test_each_sample_draws_from_its_own_groups_interval(self):
        """u = 0 is the interval's noisy end, u = 1/2 its middle."""
        four = TimestepExperts(28, 4)
        group = torch.tensor([3, 0, 2, 1, 0])
        assert four.draw_timesteps(torch.zeros(5), group).tolist() == [300.75, 1000, 550.5, 800.25, 1000]
        middles = [sum(PAPER_TRAINING[k]) / 2 for k in group]
        assert four.draw_timesteps(torch.full((5,), 0.5), group).tolist() == pytest.approx(middles)

    @given(experts(), st.floats(0, 1, exclude_max=True, width=32))
    def test_draws_stay_inside_the_interval(self, experts, draw):
        """Up to float32 rounding at inner ends; the flow itself, [0, 1000], is never left."""
        tau = experts.draw_timesteps(torch.full((experts.num_groups,), draw), torch.arange(experts.num_groups))
        for k, value in enumerate(tau.tolist()):
            high, low = experts.training_interval(k)
            assert low - 1e-4 <= value <= high + 1e-4
            assert 0 <= value <= 1000

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_timesteps_are_float32_whatever_the_draws_are(self, dtype):
        assert TimestepExperts(4, 2).draw_timesteps(torch.rand(3, dtype=dtype), torch.zeros(3).long()).dtype == (
            torch.float32
        )
