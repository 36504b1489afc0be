"""The attention backends on a CUDA device in bfloat16, at the size of Qwen2-VL-2B's heads."""

import importlib.util

import pytest
import torch

from latte_flow.model.attention import AttentionSpec
from tests.attention_oracle import Chain, gradients, make_chain, relative_error, run_model, run_oracle

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
needs_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn")
FUSED = ["sdpa", pytest.param("flash", marks=needs_flash)]
ALL = ["reference", *FUSED]

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 0.02, 0.04
"""Relative error in norm. bfloat16 rounds to 0.4 %; ``reference`` rounds its logits too, the others do not."""


def make_spec(backend: str) -> AttentionSpec:
    return AttentionSpec(
        backend=backend,
        residual=True,
        residual_source="raw",
        residual_space="logits",
        head_dim=128,
        num_image_tokens=64,
    )


@pytest.fixture(params=["no context", "padded context"])
def chain(request) -> Chain:
    """Three layers of 12 query and 2 key heads; a context has padding on either side, or is nothing but padding."""
    mask = None
    if request.param == "padded context":
        position = torch.arange(16)
        mask = torch.stack([position < 16, position < 9, position >= 5, position < 0])
    return make_chain(
        depth=3,
        batch=4,
        heads=12,
        kv_heads=2,
        tokens=64,
        head_dim=128,
        mask=mask,
        dtype=torch.bfloat16,
        device=DEVICE,
    )


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], chain: Chain) -> None:
    for i, (output, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert relative_error(output, wanted) < OUTPUT_TOLERANCE, f"output of layer {i}"
    wanted = gradients(expected, chain)
    for name, gradient in gradients(actual, chain).items():
        assert gradient.isfinite().all(), name
        assert relative_error(gradient, wanted[name]) < GRADIENT_TOLERANCE, f"gradient of {name}"


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("backend", ALL)
def test_backend_equals_plain_float64_softmax(backend, causal, chain):
    assert_close(run_model(chain, make_spec(backend), causal), run_oracle(chain, causal=causal), chain)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("backend", FUSED)
def test_fused_backend_equals_reference(backend, causal, chain):
    expected = run_model(chain, make_spec("reference"), causal)
    assert_close(run_model(chain, make_spec(backend), causal), expected, chain)


@pytest.mark.parametrize("backend", ALL)
def test_padding_changes_nothing_and_gets_exactly_zero_gradient(backend):
    mask = torch.arange(16)[None] < torch.tensor([[16], [9], [0]])
    chain = make_chain(
        depth=2, heads=12, tokens=64, head_dim=128, mask=mask, dtype=torch.bfloat16, device=DEVICE
    )  # fmt: skip
    outputs = run_model(chain, make_spec(backend))
    padding = ~chain.mask
    for name, gradient in gradients(outputs, chain).items():
        assert gradient.isfinite().all(), name
        if "context" in name:
            assert gradient.transpose(1, 2)[padding].abs().max() == 0, name
    with torch.no_grad():
        for layer in chain.layers:
            layer["context key"].masked_fill_(padding[:, None, :, None], 3e4)
            layer["context value"].masked_fill_(padding[:, None, :, None], -3e4)
    for before, after in zip(outputs, run_model(chain, make_spec(backend)), strict=True):
        assert torch.equal(before, after)
