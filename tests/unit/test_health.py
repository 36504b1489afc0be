"""Loss spikes against a median written out, and the same reports wherever a run was stopped."""

import statistics

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from latte_flow.training.configs.fields import HealthConfig
from latte_flow.training.monitor.health import MIN_HISTORY, StepHealth
from latte_flow.training.monitor.stragglers import RankTimer


@pytest.fixture(scope="module", autouse=True)
def _process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def feed(health: StepHealth, losses: list[float], first_step: int = 1) -> None:
    """Report steps whose samples have losses around the step's mean."""
    for step, loss in enumerate(losses, start=first_step):
        health.step_done(step, torch.tensor([loss - 0.25, loss + 0.25], dtype=torch.float64))


def test_a_spike_is_named_with_its_ratio_to_the_median_of_the_steps_before():
    health = StepHealth(HealthConfig(spike_ratio=2.0, spike_window=30), global_batch_size=2)
    losses = [1.0 + 0.01 * (i % 7) for i in range(40)]
    losses[25] = 5.0  # 5 times the median
    losses[30] = 1.9  # below the limit
    feed(health, losses)
    report = health.report()
    median = statistics.median(losses[:25])
    (spike,) = report["loss_spikes"]
    assert spike == {"step": 26, "loss": pytest.approx(5.0), "ratio": pytest.approx(5.0 / median)}
    assert report["loss_spike_ratio"] == spike["ratio"]


def test_the_median_is_over_the_window_and_starts_when_there_are_enough_steps():
    health = StepHealth(HealthConfig(spike_window=30), global_batch_size=2)
    feed(health, [8.0] * MIN_HISTORY)
    assert health.report() == {}
    feed(health, [1.0] * 30, first_step=MIN_HISTORY + 1)
    assert health.report()["loss_spike_ratio"] == 1.0  # at last, the window being full of them
    feed(health, [2.0], first_step=100)
    assert health.report() == {"loss_spike_ratio": pytest.approx(2.0)}  # the first ones are forgotten


@given(st.lists(st.floats(0.5, 9.0), min_size=25, max_size=60), st.data())
def test_a_run_that_was_stopped_reports_the_same(losses, data):
    stops = sorted(data.draw(st.lists(st.integers(0, len(losses)), max_size=3)))
    config = HealthConfig(spike_window=22)
    whole = StepHealth(config, global_batch_size=2)
    feed(whole, losses)
    part = StepHealth(config, global_batch_size=2)
    for first, last in zip([0, *stops], [*stops, len(losses)], strict=True):
        feed(part, losses[first:last], first_step=first + 1)
        state = part.state_dict()
        part = StepHealth(config, global_batch_size=2)
        part.load_state_dict(state)
    assert part.report() == whole.report()


def test_a_row_of_skipped_steps_can_be_forgotten():
    health = StepHealth(HealthConfig(), global_batch_size=4)
    indices = torch.tensor([4, 5, 6, 7])
    health.step_skipped(2, {"loss": (torch.tensor([1.0, torch.nan, 1.0, torch.inf]), indices)})
    feed(health, [1.0], first_step=3)
    before = health.state_dict()
    for step in (4, 5):
        assert health.step_skipped(step, {"loss": (torch.ones(4), indices)})["nonfinite_loss"] == []
    assert health.consecutive_skips == 2
    assert health.state_dict(forget_skipped=2) == before
    assert [entry["step"] for entry in health.report()["skipped"]] == [2, 4, 5]
    assert health.state_dict(forget_skipped=2)["skipped_in_a_row"] == 0


def test_skipped_steps_name_their_samples():
    health = StepHealth(HealthConfig(), global_batch_size=4)
    losses = torch.tensor([torch.inf, 1.0, torch.nan, 1.0]), torch.tensor([7, 4, 5, 6])
    health.step_skipped(2, {"loss": losses})
    assert health.report()["skipped"] == [{"step": 2, "samples": [4, 7], "nonfinite_loss": [5, 7]}]
    assert health.report() == {}


def test_the_samples_of_several_losses_are_named_apart():
    health, indices = StepHealth(HealthConfig(), global_batch_size=2), torch.tensor([2, 3])
    one, two = (torch.tensor([1.0, torch.nan]), indices), (torch.tensor([1.0, 2.0]), indices)
    entry = health.step_skipped(2, {"loss_one": one, "loss_two": two})
    assert entry == {"step": 2, "samples": [2, 3], "nonfinite_loss_one": [3], "nonfinite_loss_two": []}


def test_a_rank_timer_reports_each_interval_alone(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 26.0])
    monkeypatch.setattr("latte_flow.training.monitor.stragglers.time.perf_counter", lambda: next(clock))
    timer = RankTimer(torch.device("cpu"))
    with timer.on_host():
        pass
    with timer.on_device():
        pass
    expected = {"rank_seconds_min": 1.5, "rank_seconds_median": 1.5, "rank_seconds_max": 1.5, "slowest_rank": 0}
    assert timer.report(steps=2) == expected
    with timer.on_host():
        pass
    assert timer.report(steps=1)["rank_seconds_max"] == 6.0
