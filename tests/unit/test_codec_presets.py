"""Codecs: presets that name a checkpoint, fingerprints, batches."""

import json

import pytest
import torch

from latte_flow.model.codecs import PRESETS, PixelCodec, apply_preset, load_codec
from tests.tiny_models import save_tiny_dc_ae


@pytest.fixture(scope="module")
def dc_ae(tmp_path_factory):
    return save_tiny_dc_ae(tmp_path_factory.mktemp("models") / "dc_ae")


def test_an_image_is_coded_alike_alone_and_in_a_batch(dc_ae):
    codec = load_codec("dc-ae", path=dc_ae).train()  # would normalise by the batch, were it to leave eval mode
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    latents = codec.encode(images)
    torch.testing.assert_close(latents, torch.cat([codec.encode(i[None]) for i in images]))
    torch.testing.assert_close(codec.decode(latents), torch.cat([codec.decode(x[None]) for x in latents]))


def test_fingerprint_tells_encoders_apart_and_ignores_the_loaded_type(dc_ae, tmp_path):
    mine = load_codec("dc-ae", path=dc_ae).fingerprint()
    assert load_codec("dc-ae", path=dc_ae, dtype=torch.bfloat16).fingerprint() == mine
    assert load_codec("dc-ae", path=save_tiny_dc_ae(tmp_path / "a", seed=1)).fingerprint() != mine
    assert load_codec("dc-ae", path=save_tiny_dc_ae(tmp_path / "b", scaling_factor=0.3)).fingerprint() != mine
    assert PixelCodec(3, 1).fingerprint() != PixelCodec(3, 2).fingerprint()


def test_a_preset_names_its_checkpoint_and_factor():
    in_1_0, sana = "dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0"
    assert apply_preset(in_1_0, None, None) == ("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", 0.3189)
    assert apply_preset(sana, "a/folder", None) == ("a/folder", 0.41407)
    assert apply_preset(None, "a/folder", 0.5) == ("a/folder", 0.5)
    with pytest.raises(ValueError, match=r"^scaling_factor: 0\.3189 contradicts preset .*sana.* 0\.41407"):
        apply_preset(sana, None, 0.3189)
    with pytest.raises(ValueError, match=r"^preset: 'other' is unknown; accepted values: dc-ae-f32c32-in-1\.0"):
        apply_preset("other", None, None)


def test_a_checkpoint_of_another_scale_than_its_preset_is_refused(dc_ae, tmp_path):
    with pytest.raises(ValueError, match=r"^scaling_factor: 0\.3189 differs from 0\.4 in the checkpoint"):
        load_codec("dc-ae", path=dc_ae, preset="dc-ae-f32c32-in-1.0")
    for preset, known in PRESETS.items():
        folder = save_tiny_dc_ae(tmp_path / preset, scaling_factor=known.scaling_factor)
        assert load_codec("dc-ae", path=folder, preset=preset).scaling_factor == known.scaling_factor
        assert json.loads((folder / "config.json").read_text())["scaling_factor"] == known.scaling_factor
