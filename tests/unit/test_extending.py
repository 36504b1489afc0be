"""docs/extending.md: its examples, run as they stand there, make components that the package then uses."""

import copy
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from diffusers import AutoencoderKL

from latte_flow.model.backbone import BACKBONES, load_vlm
from latte_flow.model.codecs import CODECS, load_codec
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.solvers import SOLVERS, integrate
from latte_flow.model.time_grids import TIME_GRIDS, make_timesteps, uniform_timesteps
from latte_flow.model.timestep_experts import TimestepExperts
from latte_flow.model.tiny_vlm import build_tiny_tokenizer
from latte_flow.tools.encode_latents import encode_latents
from latte_flow.training.configs.fields import Assumptions, DataConfig
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.sources import SOURCES, find_source
from latte_flow.training.dry_run import dry_run, format_table
from latte_flow.training.errors import UserError
from latte_flow.training.objectives.base import OBJECTIVES
from latte_flow.training.run_folder import hash_files
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


@pytest.fixture
def vae(tmp_path) -> str:
    """A tiny AutoencoderKL for grey images, with random weights."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"in_channels": 1, "out_channels": 1, "block_out_channels": [8, 8], "norm_num_groups": 2}
    AutoencoderKL(**blocks, **sizes, latent_channels=2, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


def test_a_codec(tmp_path, vae):
    """It encodes, decodes, has a place in a run's record and in a saved pipeline, and makes latents that know it again."""
    with patch.dict(CODECS):
        exec(example("Codec"), scope := {"__name__": __name__})
        codec = load_codec("kl", path=vae)
        images = torch.rand(2, 1, 8, 8) * 2 - 1
        latents = codec.encode(images)
        assert latents.shape == (2, codec.latent_channels, *codec.latent_size(8)) == (2, 2, 4, 4)
        assert codec.decode(latents).shape == images.shape
        torch.testing.assert_close(latents, codec.vae.encode(images).latent_dist.mean * 0.5)
        assert {p.device.type for p in load_codec("kl", path=vae, meta=True).parameters()} == {"meta"}
        config = parse_config(["--codec.kind", "kl", "--codec.path", vae])
        assert "codec.path/config.json" in hash_files(config, own=False)
        codec.save_pretrained(tmp_path / "saved")
        assert scope["KLCodec"].from_pretrained(tmp_path / "saved").fingerprint() == codec.fingerprint()
        options = {"num_workers": 0, "resolution": 8, "flip": False, "precision": "fp32", "device": "cpu"}
        encode_latents(source="digits", output=str(tmp_path / "out"), codec="kl", codec_path=vae, **options)
        config = DataConfig(dataset="latents", path=str(tmp_path / "out"), resolution=8, horizontal_flip=False)
        dataset = load_image_dataset(config)
        dataset.check_codec(codec)
        assert dataset.sample(0, flip=False)["latent"].shape == (2, 4, 4)
        made_with = dataset.manifest["codec"]
        assert (made_with["kind"], made_with["path"], made_with["precision"]) == ("kl", vae, "fp32")
    with pytest.raises(UserError, match=r"codec\.kind: got 'kl'; accepted: pixel, dc-ae"):
        parse_config(["--codec.kind", "kl"])


def test_a_data_source():
    with patch.dict(SOURCES):
        exec(example("Data source"), {})
        config = parse_config(["--data.dataset", "stripes", "--data.prompt_template", "{}"]).data
        images = load_image_dataset(config)
        assert (len(images), images.image_channels, find_source("stripes").image_channels) == (100, 1, 1)
        image, row = images[0]
        assert images.prompts[row] == "vertical stripes"
        assert torch.equal(image, image[:, :1].expand(1, 8, 8))  # the same in every line
        assert not torch.equal(image, images[1][0])
    with pytest.raises(UserError, match=r"data\.dataset: 'stripes' is unknown; accepted values: .*digits.*hf"):
        load_image_dataset(config)
