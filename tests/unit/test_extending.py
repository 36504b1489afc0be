"""docs/extending.md: its examples, run as they stand there, make components that the package then uses."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from latte_flow.model.solvers import SOLVERS, integrate
from latte_flow.model.time_grids import TIME_GRIDS, make_timesteps, uniform_timesteps
from latte_flow.model.timestep_experts import TimestepExperts
from latte_flow.training.configs.parser import parse_config

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
