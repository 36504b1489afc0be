"""docs/extending.md: its examples, run as they stand there, make components that the package then uses."""

import copy
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from latte_flow.model.backbone import BACKBONES, load_vlm
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.solvers import SOLVERS, integrate
from latte_flow.model.time_grids import TIME_GRIDS, make_timesteps, uniform_timesteps
from latte_flow.model.timestep_experts import TimestepExperts
from latte_flow.model.tiny_vlm import build_tiny_tokenizer
from latte_flow.training.configs.fields import Assumptions
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.dry_run import dry_run, format_table
from latte_flow.training.objectives.base import OBJECTIVES
from tests.tiny import make_model, noise, text_prompts, vlm_config

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


def test_a_backbone(tmp_path):
    """Its VLM is loaded by its path, trains in a Blend, and comes back from a folder; without the entry it is refused."""
    with patch.dict(BACKBONES):
        names = {}
        exec(example("Backbone"), names)
        config = names["StudioConfig"](
            **{k: v for k, v in vlm_config(4, "qwen3_vl").to_dict().items() if k != "model_type"}
        )
        names["StudioVL"](config).save_pretrained(tmp_path / "vlm")
        build_tiny_tokenizer(["a word"], 300).save_pretrained(tmp_path / "vlm")
        vlm, _ = load_vlm(tmp_path / "vlm")
        assert type(vlm) is names["StudioVL"]
        model = make_model(vlm, variant="blend")
        batch = {"context_rows": torch.arange(4) % 3, "prompt_inputs": text_prompts()}
        velocity = model(noise(4), torch.tensor([900.0, 600.0, 400.0, 100.0]), **batch)
        velocity.square().mean().backward()
        assert model.vlm.model.language_model.layers[0].self_attn.q_norm.weight.grad.any()
        model.save_pretrained(tmp_path / "model")
        loaded = copy.deepcopy(LatteFlowModel.from_pretrained(tmp_path / "model"))
        assert torch.equal(loaded(noise(4), torch.tensor([900.0, 600.0, 400.0, 100.0]), **batch), velocity)
    with pytest.raises(ValueError, match=r"holds a studio_vl; accepted: qwen2_vl, qwen2_5_vl, qwen3_vl$"):
        load_vlm(tmp_path / "vlm")


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
