"""The weighted sum of objectives, and that what runs them knows none of them."""

import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from latte_flow.training.configs.parser import parse_config
from latte_flow.training.data.loader import Batch
from latte_flow.training.objectives.base import (
    OBJECTIVES,
    Objective,
    Objectives,
    RunParts,
    join_rows,
    register_objective,
)

TRAINING = Path(__file__).parents[2] / "training"
GENERIC = ("trainer", "dry_run", "data/loader", "distributed/batch_layout", "monitor/metrics", "monitor/health")
OF_FLOW_MATCHING = r"flow.matching|velocit|timestep|\btau\b|nois|expert|\bgates?\b|codec|latents?\b"


@pytest.mark.parametrize("module", GENERIC)
def test_what_runs_objectives_has_no_word_of_flow_matching(module):
    text = (TRAINING / f"{module}.py").read_text()
    lines = text.splitlines()
    assert [line for line in lines if re.search(OF_FLOW_MATCHING, line, re.IGNORECASE)] == []


def make_objective(scale: float):
    """An objective whose loss of sample i is scale x i, reported under a further name too."""

    class Scaled(Objective):
        metric_names = (f"loss_again_{scale:g}",)

        def __init__(self, parts):
            self.samples = None

        @classmethod
        def trained_parameters(cls, model):
            return set()

        @classmethod
        def count(cls, parts):
            raise NotImplementedError

        def compute_losses(self, engine, batch):
            return engine.weight * scale * batch.sample_indices

        def metric_columns(self, batch):
            return torch.zeros_like(batch.sample_indices)[None]

    return Scaled


@pytest.fixture
def objectives():
    """Build the objectives of a run with these weights: tens, thirds."""
    with patch.dict(OBJECTIVES):
        register_objective("tens")(make_objective(10))
        register_objective("thirds")(make_objective(1 / 3))

        def build(**weights) -> Objectives:
            config = parse_config([f"--objectives.{name}={weight}" for name, weight in weights.items()])
            return Objectives(RunParts(config, None, None, SimpleNamespace(data_group=None), None, torch.device("cpu")))

        yield build


def run_step(objectives: Objectives, *micro_batches: list[int]) -> tuple[list[torch.Tensor], dict]:
    engine = SimpleNamespace(weight=torch.ones((), requires_grad=True))
    batches = [{name: Batch(torch.tensor(indices)) for name in objectives.parts} for indices in micro_batches]
    computed = [objectives.compute_losses(engine, batch) for batch in batches]
    return [loss for loss, _ in computed], join_rows([rows for _, rows in computed])


def test_the_loss_is_the_weighted_sum_of_means_with_one_graph(objectives):
    both = objectives(thirds=3.0, tens=0.5)
    losses, rows = run_step(both, [1, 2], [3, 6])
    assert [loss.item() for loss in losses] == pytest.approx([3 * 0.5 + 0.5 * 15, 3 * 1.5 + 0.5 * 45])
    losses[0].backward()
    assert not rows["tens"].losses.requires_grad
    assert both.record(rows).item() == pytest.approx(3 * 1 + 0.5 * 30)
    expected = {"loss": 18, "loss_tens": 30, "loss_again_10": 30, "loss_thirds": 1, "loss_again_0.333333": 1}
    assert both.report() == pytest.approx(expected)
    assert list(both.report()) == ["loss"]  # NaN: nothing since
    values, indices = both.losses_by_metric(rows)["loss_thirds"]
    assert values.tolist() == pytest.approx([index / 3 for index in indices.tolist()])
    assert indices.tolist() == [1, 2, 3, 6]


def test_one_objective_is_the_loss(objectives):
    one = objectives(tens=1.0)
    _, rows = run_step(one, [1, 2])
    one.record(rows)
    assert one.report() == {"loss": 15, "loss_again_10": 15}
    assert list(one.losses_by_metric(rows)) == ["loss"]


def test_the_order_of_the_names_does_not_matter(objectives):
    assert list(objectives(thirds=1.0, tens=1.0).parts) == list(objectives(tens=1.0, thirds=1.0).parts)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'flow_matching' is taken"):
        register_objective("flow_matching")(OBJECTIVES["flow_matching"])
