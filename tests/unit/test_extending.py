"""docs/extending.md: its examples, run as they stand there, make components that the package then uses."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from latte_flow.model.solvers import SOLVERS, integrate
from latte_flow.model.time_grids import TIME_GRIDS, make_timesteps, uniform_timesteps
from latte_flow.model.timestep_experts import TimestepExperts
from latte_flow.training.configs.fields import Assumptions
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.dry_run import dry_run, format_table
from latte_flow.training.objectives.base import OBJECTIVES

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def example(section: str) -> str:
    """Return the code of a section."""
    (text,) = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def test_a_solver():
    """Second order: dx/dt = x over one unit, with an error that a quarter remains of when the steps are halved."""
    with patch.dict(SOLVERS):
        exec(example("Sampler and solver"), {})
        start = torch.ones(1, dtype=torch.float64)
        errors = [
            abs(integrate(lambda x, tau, group: x, start, uniform_timesteps(n), "midpoint").item() - torch.e)
            for n in (100, 200)
        ]
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)
        assert parse_config(["--sample.solver", "midpoint"]).sample.solver == "midpoint"
    assert "midpoint" not in SOLVERS


def test_a_time_grid():
    with patch.dict(TIME_GRIDS):
        exec(example("Time grid"), {})
        experts = TimestepExperts(num_layers=4, num_groups=2)
        assert make_timesteps(experts, 64, num_steps=4, time_grid="quadratic") == [1000, 562.5, 250, 62.5, 0]
        assert parse_config(["--sample.time_grid", "quadratic"]).sample.time_grid == "quadratic"


def test_an_objective_in_the_dry_run():
    """Its own rows beside those of flow matching, whose counts stay; alone, only what it reaches is trained."""
    with patch.dict(OBJECTIVES):
        exec(example("Objective"), {"__name__": "example"})
        runs = {}
        for names in (["flow_matching"], ["unit_scale"], ["flow_matching", "unit_scale"]):
            config = parse_config([f"--objectives.{name}=2" for name in names])
            runs["+".join(names)] = dry_run(config, Assumptions(gpus=2)), config
    (flow, _), (alone, _), (both, config) = runs.values()
    weights = 64 * 128  # tokens of one channel, width 128
    assert alone.parameters["trained"] == 2 * 128
    assert alone.flops["forward"] == 2 * weights
    for counts in (flow, alone):
        name = "flow_matching" if counts is flow else "unit_scale"
        for label in ("forward", "forward and backward"):
            assert both.flops[f"{label}, {name}"] == counts.flops[label]
    assert both.seconds == pytest.approx(flow.seconds + alone.seconds)
    label = "activations kept for the backward pass"
    assert both.memory[f"{label}, unit_scale"] == alone.memory[label] > 0
    assert sum(both.memory.values()) == sum(flow.memory.values()) + alone.memory[label]
    assert f"  {label}, unit_scale " in format_table(config, both, Assumptions(gpus=2))
