"""Activation checkpointing changes what is kept for the backward pass, and no number."""

import copy
import dataclasses

import pytest
import torch

from latte_flow.model.activation_checkpointing import checkpoint_activations
from latte_flow.model.context import encode_context
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.configs.saved import differences
from latte_flow.training.dry_run import SavedBytes
from tests.tiny import make_model, make_vlm, noise, text_prompts

TIMESTEPS = torch.tensor([990.0, 800.0, 740.0, 600.0, 480.0, 300.0, 200.0, 20.0])


def train_once(model, vlm):
    """Return the velocity, the gradients, and the bytes kept between the passes."""
    prompts, context = text_prompts(), None
    if model.config.variant == "couple":
        context = encode_context(vlm, prompts, model.config.context_projection).to(dtype=model.dtype)
    with SavedBytes(model) as saved:
        velocity = model(noise(8), TIMESTEPS, context=context, context_rows=torch.arange(8) % 3, prompt_inputs=prompts)
        kept = saved.total
        (velocity - noise(8, seed=3)).square().mean().backward()
    return velocity, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("qwen2_vl", torch.float32, {"variant": "couple"}),
        ("qwen2_vl", torch.bfloat16, {"variant": "couple", "residual_source": "accumulated"}),
        ("qwen3_vl", torch.bfloat16, {"variant": "couple", "attention_backend": "sdpa", "context_projection": "vlm"}),
        ("qwen2_vl", torch.bfloat16, {"variant": "blend", "residual_source": "accumulated"}),
        ("qwen3_vl", torch.float32, {"variant": "blend", "attention_backend": "sdpa", "shared_modules": []}),
        ("qwen2_vl", torch.float32, {"variant": "blend", "context_projection": "vlm", "modulation": "six"}),
    ],
    ids=str,
)
def test_losses_and_gradients_keep_their_bits(family, dtype, settings):
    vlm = make_vlm(family=family)
    plain = make_model(vlm, num_groups=4, **settings).to(dtype).train()
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    expected, gradients, kept = train_once(plain, vlm)
    velocity, own, kept_less = train_once(checkpointed, vlm)
    assert torch.equal(velocity, expected)
    assert own.keys() == gradients.keys()
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 0
    assert kept_less < 0.75 * kept


def test_it_may_change_when_a_run_is_resumed():
    config = TrainingConfig()
    assert differences(config, dataclasses.replace(config, activation_checkpointing=True)) == []
