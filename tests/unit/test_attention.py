"""Joint attention: every backend against a plain float64 softmax (tests/attention_oracle.py) and closed forms."""

import dataclasses
import math
import sys
import types

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import eager_attention_forward

from latte_flow.model import attention
from latte_flow.model.attention import AttentionSpec, ContextKeyValues, Residual, joint_attention
from tests.attention_oracle import Chain, gradients, make_chain, relative_error, run_model, run_oracle

pytestmark = pytest.mark.usefixtures("flash_attn")

BACKENDS = ("reference", "sdpa", "flash")
# (backend, residual_source, residual_space) of everything that can be computed
RESIDUALS = [
    ("reference", "raw", "logits"),
    ("reference", "accumulated", "logits"),
    ("reference", "raw", "probabilities"),
    ("reference", "accumulated", "probabilities"),
    ("sdpa", "raw", "logits"),
    ("sdpa", "accumulated", "logits"),
    ("flash", "raw", "logits"),
]
CONTEXTS = {
    "no context": None,
    # all real; padding on both sides and between; nothing but padding
    "padded context": torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool),
    "context of length 0": torch.zeros(3, 0, dtype=torch.bool),
}
MASK = CONTEXTS["padded context"]


def make_spec(backend: str = "reference", **changes) -> AttentionSpec:
    fields = {
        "residual": True,
        "residual_source": "raw",
        "residual_space": "logits",
        "head_dim": 8,
        "num_image_tokens": 5,
    }
    return AttentionSpec(backend=backend, **(fields | changes))


def assert_equal_to_oracle(chain: Chain, spec: AttentionSpec, causal: bool, source: str, space: str) -> None:
    """Compare the outputs of all layers and the gradients of all their inputs."""
    actual = run_model(chain, spec, causal)
    expected = run_oracle(chain, source=source, space=space, causal=causal)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11, msg=lambda m, i=i: f"output of layer {i}: {m}")
    actual, expected = gradients(actual, chain), gradients(expected, chain)
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("mask", CONTEXTS.values(), ids=CONTEXTS)
class TestEqualsPlainSoftmax:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_without_residual(self, backend, mask, causal):
        chain = make_chain(depth=1, mask=mask)
        assert_equal_to_oracle(chain, make_spec(backend, residual=False), causal, "raw", "logits")

    @pytest.mark.parametrize(("backend", "source", "space"), RESIDUALS)
    def test_with_residual_over_three_layers(self, backend, source, space, mask, causal):
        chain = make_chain(depth=3, mask=mask)
        spec = make_spec(backend, residual_source=source, residual_space=space)
        assert_equal_to_oracle(chain, spec, causal, source, space)


@pytest.mark.parametrize("kv_heads", [1, 4], ids=["one key head", "as many key heads as query heads"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_key_heads(backend, kv_heads):
    chain = make_chain(depth=2, kv_heads=kv_heads, mask=MASK)
    assert_equal_to_oracle(chain, make_spec(backend), False, "raw", "logits")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_image_token(backend):
    chain = make_chain(depth=2, tokens=1, mask=MASK)
    assert_equal_to_oracle(chain, make_spec(backend, num_image_tokens=1), True, "raw", "logits")


def test_raw_and_accumulated_differ_from_the_third_layer_on():
    chain = make_chain(depth=3)
    raw, accumulated = run_model(chain, make_spec()), run_model(chain, make_spec(residual_source="accumulated"))
    assert torch.equal(raw[1], accumulated[1])
    assert relative_error(raw[2], accumulated[2]) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_attention_of_qwen2_vl_without_residual(backend):
    """transformers' own eager attention over [context ; image] keys with an additive mask."""
    layer = {name: x.detach().float() for name, x in make_chain(depth=1, mask=MASK).layers[0].items()}
    context = ContextKeyValues(layer["context key"], layer["context value"], MASK)
    output, _ = joint_attention(
        layer["query"], layer["key"], layer["value"], spec=make_spec(backend, residual=False), context=context
    )
    bias = torch.where(torch.cat([MASK, torch.ones(3, 5, dtype=torch.bool)], dim=1), 0.0, torch.finfo().min)
    expected, _ = eager_attention_forward(
        types.SimpleNamespace(num_key_value_groups=2, training=False),
        layer["query"],
        torch.cat([layer["context key"], layer["key"]], dim=2),
        torch.cat([layer["context value"], layer["value"]], dim=2),
        bias[:, None, None, :],
        scaling=8**-0.5,
    )
    torch.testing.assert_close(output, expected.flatten(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "source"), [(b, source) for b, source, space in RESIDUALS if space == "logits"])
def test_context_columns_get_no_residual(backend, source):
    """With own logits 0 and a previous map of c everywhere, each image key weighs e^{g c} and each context key 1."""
    batch, heads, tokens, width, c = 3, 4, 5, 8, 3.0
    spec = make_spec(backend, residual_source=source)
    rng = torch.Generator().manual_seed(2)
    value = torch.randn(batch, heads, tokens, width, generator=rng, dtype=torch.float64)
    context_value = torch.randn(batch, heads, 4, width, generator=rng, dtype=torch.float64)
    zeros = torch.zeros_like(value)
    # context keys that would matter if the previous queries (or the padding of the concatenated heads) reached them
    context = ContextKeyValues(torch.full_like(context_value, 50.0), context_value, MASK)
    previous_query = torch.full_like(value, c * math.sqrt(width) / width)
    _, previous = joint_attention(previous_query, torch.ones_like(value), value, spec=spec)
    gate = torch.linspace(-0.9, 0.9, batch * heads, dtype=torch.float64).view(batch, heads)

    output, _ = joint_attention(zeros, zeros, value, spec=spec, context=context, previous=previous, gate=gate)

    image_weight = torch.exp(gate * c)[..., None]
    context_sum = (context_value * MASK[:, None, :, None]).sum(dim=2)
    total = MASK.sum(dim=1).view(batch, 1, 1) + tokens * image_weight
    expected = (context_sum + image_weight * value.sum(dim=2)) / total  # [B, H, E], the same for every query
    torch.testing.assert_close(output, expected.flatten(1)[:, None].expand(-1, tokens, -1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_context_tokens_is_irrelevant(backend):
    chain = make_chain(depth=2, mask=MASK)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = [
        {name: x[:, :, order] if name.startswith("context") else x for name, x in layer.items()}
        for layer in chain.layers
    ]
    outputs = run_model(chain, make_spec(backend))
    for a, b in zip(outputs, run_model(Chain(shuffled, MASK[:, order]), make_spec(backend)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class TestPadding:
    @pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
    @pytest.mark.parametrize(("backend", "source", "space"), RESIDUALS)
    def test_content_of_padding_changes_nothing(self, backend, source, space, causal):
        """Neither outputs nor any gradient, to the last bit, even when the padding holds huge numbers."""
        spec = make_spec(backend, residual_source=source, residual_space=space)
        chain = make_chain(depth=3, mask=MASK)
        padding = ~MASK[:, None, :, None]
        dirty = Chain(
            [
                {
                    name: x.detach().masked_fill(padding, sign * 1e30).requires_grad_()
                    if name.startswith("context")
                    else x
                    for name, x in layer.items()
                }
                for layer, sign in zip(chain.layers, (1, -1, 1), strict=True)
            ],
            MASK,
        )
        outputs, dirty_outputs = run_model(chain, spec, causal), run_model(dirty, spec, causal)
        for a, b in zip(outputs, dirty_outputs, strict=True):
            assert torch.equal(a, b)
        clean_gradients, dirty_gradients = gradients(outputs, chain), gradients(dirty_outputs, dirty)
        for name in clean_gradients:
            assert torch.equal(clean_gradients[name], dirty_gradients[name]), name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("backend", "source", "space"), RESIDUALS)
    def test_padding_gets_exactly_zero_gradient(self, backend, source, space, dtype):
        spec = make_spec(backend, residual_source=source, residual_space=space)
        chain = make_chain(depth=3, mask=MASK, dtype=dtype)
        for name, gradient in gradients(run_model(chain, spec), chain).items():
            assert gradient.isfinite().all(), name
            if name.endswith(("context key", "context value")):
                at_padding = gradient.transpose(1, 2)[~MASK]
                assert torch.equal(at_padding, torch.zeros_like(at_padding)), name
                assert gradient.transpose(1, 2)[MASK].abs().sum() > 0, name

    def test_the_stand_in_kernel_poisons_gradients_of_padding(self, flash_attn):
        """Or the zero gradients above would say nothing about flash."""
        k = torch.ones(5, 1, 8, requires_grad=True)
        lengths = torch.tensor([0, 3], dtype=torch.int32)
        output = flash_attn.flash_attn_varlen_func(torch.ones(3, 1, 8), k, torch.ones(5, 1, 8), lengths, lengths, 3, 3)
        output.sum().backward()
        assert k.grad[:3].isfinite().all()
        assert k.grad[3:].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("mask", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize(("backend", "source", "space"), RESIDUALS)
def test_gate_passes_gradcheck(backend, source, space, mask):
    """Finite differences of the third layer's output by both gates (the first one acts through the accumulated map)."""
    spec = make_spec(backend, residual_source=source, residual_space=space)
    chain = make_chain(depth=3, batch=3, tokens=2, mask=mask)
    for leaf in chain.leaves().values():
        leaf.requires_grad_(False)

    def outputs(*gates: Tensor) -> tuple[Tensor, ...]:
        layers = [chain.layers[0], *({**chain.layers[i + 1], "gate": gate} for i, gate in enumerate(gates))]
        return tuple(run_model(Chain(layers, mask), spec)[1:])

    gates = [chain.layers[i]["gate"].clone().requires_grad_() for i in (1, 2)]
    assert torch.autograd.gradcheck(outputs, gates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_previous_layers_query_and_key_pass_gradcheck(backend):
    spec = make_spec(backend)
    chain = make_chain(depth=2, batch=1, tokens=2, heads=2, kv_heads=1, mask=MASK[1:2])
    first, second = chain.layers
    for leaf in chain.leaves().values():
        leaf.requires_grad_(False)

    def output(query: Tensor, key: Tensor) -> Tensor:
        return run_model(Chain([{**first, "query": query, "key": key}, second], chain.mask), spec)[1]

    assert torch.autograd.gradcheck(output, [first["query"].requires_grad_(), first["key"].requires_grad_()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_gate_is_plain_attention(backend):
    """W_t starts at zero, so training starts from the model without residual."""
    chain = make_chain(depth=2, mask=MASK)
    with torch.no_grad():
        chain.layers[1]["gate"].zero_()
    plain = {name: x for name, x in chain.layers[1].items() if name != "gate"}
    with_residual = run_model(chain, make_spec(backend))[1]
    without = run_model(Chain([plain], MASK), make_spec(backend, residual=False))[0]
    torch.testing.assert_close(with_residual, without, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_within_rounding(backend):
    """Outputs within 1 %, gradients within 2 % in norm; leaving the residual out would cost more than 10 %."""
    chain = make_chain(depth=3, mask=MASK, dtype=torch.bfloat16)
    outputs, expected = run_model(chain, make_spec(backend)), run_oracle(chain)
    assert all(output.dtype == torch.bfloat16 for output in outputs)
    for output, wanted in zip(outputs, expected, strict=True):
        assert relative_error(output, wanted) < 0.01
    wanted = gradients(expected, chain)
    for name, gradient in gradients(outputs, chain).items():
        assert relative_error(gradient, wanted[name]) < 0.02, name
    plain = [{name: x for name, x in layer.items() if name != "gate"} for layer in chain.layers]
    assert relative_error(run_oracle(Chain(plain, MASK))[2], expected[2]) > 0.1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_logits_of_large_keys_are_not_rounded_to_the_type_of_the_weights(dtype, bound):
    """Qwen2's key biases reach hundreds. A product rounded to bfloat16 is off by 2 %; in float16 it is infinite."""
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 64, 128, generator=rng) for _ in range(3))
    query[..., 4:8], key[..., :4] = query[..., 4:8] + 300, key[..., :4] + 300
    query[..., :4], key[..., 4:8] = query[..., :4] / 8, key[..., 4:8] + 300
    narrow = [x.to(dtype) for x in (query, key, value)]
    spec = make_spec(head_dim=128, num_image_tokens=64)
    output, residual = joint_attention(*narrow, spec=spec)
    exact, expected = joint_attention(*(x.double() for x in narrow), spec=spec)
    assert expected.maps.abs().max() * 128**0.5 > torch.finfo(torch.float16).max
    assert relative_error(output.double(), exact) < bound
    assert residual.maps.dtype == torch.float32
    assert relative_error(residual.maps.double(), expected.maps) < 1e-6


def test_no_residual_is_handed_on_when_there_is_none():
    layer = make_chain(depth=1).layers[0]
    for backend in BACKENDS:
        spec = make_spec(backend, residual=False)
        assert joint_attention(layer["query"], layer["key"], layer["value"], spec=spec)[1] is None


def test_a_residual_without_its_gate_and_a_gate_without_residual_are_refused():
    layer = make_chain(depth=1).layers[0]
    inputs = layer["query"], layer["key"], layer["value"]
    _, residual = joint_attention(*inputs, spec=make_spec())
    gate = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="gate"):
        joint_attention(*inputs, spec=make_spec(), previous=residual)
    with pytest.raises(AssertionError, match="gate"):
        joint_attention(*inputs, spec=make_spec(), gate=gate)
    with pytest.raises(AssertionError, match="residual"):
        joint_attention(*inputs, spec=make_spec(residual=False), previous=residual, gate=gate)


def test_reference_hands_on_the_scaled_logits():
    """The similarity figures read these maps: A = q k^T / sqrt(E), before mask and softmax."""
    chain = make_chain(depth=1, mask=MASK)
    layer = chain.layers[0]
    context = ContextKeyValues(layer["context key"], layer["context value"], MASK)
    inputs = layer["query"], layer["key"], layer["value"]
    _, residual = joint_attention(*inputs, spec=make_spec(), context=context, causal=True)
    expected = torch.stack(
        [torch.einsum("bne,bme->bnm", layer["query"][:, h], layer["key"][:, h // 2]) / math.sqrt(8) for h in range(4)],
        dim=1,
    )
    assert isinstance(residual, Residual)
    torch.testing.assert_close(residual.maps, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"backend": "sdpa", "residual_space": "probabilities"},
            ["attention_backend: sdpa", "residual_space: probabilities", "accepted: attention_backend: reference"],
        ),
        (
            {"backend": "flash", "residual_space": "probabilities"},
            ["attention_backend: flash", "residual_space: probabilities", "accepted: attention_backend: reference"],
        ),
        (
            {"backend": "flash", "residual_source": "accumulated"},
            ["attention_backend: flash", "residual_source: accumulated", "accepted: residual_source: raw"],
        ),
        (
            {"backend": "flash", "head_dim": 136},
            ["attention_backend: flash", "256", "272", "accepted: reference, sdpa"],
        ),
        (
            {"backend": "flash", "head_dim": 264, "residual": False},
            ["attention_backend: flash", "256", "264", "accepted: reference, sdpa"],
        ),
        ({"backend": "eager"}, ["attention_backend", "'eager'", "auto, reference, sdpa, flash"]),
        ({"residual_source": "both"}, ["residual_source", "'both'", "raw, accumulated"]),
        ({"residual_space": "scores"}, ["residual_space", "'scores'", "logits, probabilities"]),
    ],
)
def test_unsupported_combinations_name_the_field_and_what_is_accepted(changes, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        make_spec(**changes)
    for word in words:
        assert word in str(error.value)


def test_flash_without_the_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match=r"attention_backend: flash .*flash-attn.*accepted: reference, sdpa"):
        make_spec("flash")


@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "flash", "head_dim": 128},
        {"backend": "flash", "head_dim": 256, "residual": False},
        # without a residual its definition does not matter
        {"backend": "flash", "residual": False, "residual_source": "accumulated", "residual_space": "probabilities"},
        {"backend": "sdpa", "residual": False, "residual_space": "probabilities"},
        {"backend": "sdpa", "residual_source": "accumulated", "head_dim": 512},
    ],
)
def test_what_a_backend_can_do_is_accepted(changes):
    assert make_spec(**changes).backend == changes["backend"]


@pytest.mark.parametrize(
    ("changes", "cuda", "installed", "chosen"),
    [
        ({"num_image_tokens": 64}, True, True, "reference"),
        ({"num_image_tokens": 256}, True, True, "reference"),
        ({"num_image_tokens": 257}, True, True, "flash"),
        ({"num_image_tokens": 257}, True, False, "sdpa"),
        ({"num_image_tokens": 257}, False, True, "sdpa"),
        ({"num_image_tokens": 1024, "head_dim": 128}, True, True, "flash"),
        ({"num_image_tokens": 1024, "head_dim": 160}, True, True, "sdpa"),
        ({"num_image_tokens": 1024, "head_dim": 160, "residual": False}, True, True, "flash"),
        ({"num_image_tokens": 1024, "residual_source": "accumulated"}, True, True, "sdpa"),
        ({"num_image_tokens": 1024, "residual_space": "probabilities"}, True, True, "reference"),
        ({"num_image_tokens": 1024, "residual_space": "probabilities", "residual": False}, True, True, "flash"),
    ],
)
def test_auto_follows_its_rule(monkeypatch, changes, cuda, installed, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    if not installed:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    spec = make_spec("auto", **changes)
    assert spec.backend == chosen
    assert dataclasses.replace(spec).backend == chosen


def test_auto_still_refuses_unknown_names():
    with pytest.raises(ValueError, match="residual_source: 'x' is unknown; accepted values: raw, accumulated"):
        make_spec("auto", residual_source="x")


def test_what_the_flash_kernel_cannot_take_goes_through_sdpa_and_says_so_once(flash_attn, monkeypatch, caplog):
    """A checkpoint trained with flash is sampled in float32, or on the CPU, too."""
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    attention._warn_once.cache_clear()
    sizes = {
        "residual": True,
        "residual_source": "raw",
        "residual_space": "logits",
        "head_dim": 8,
        "num_image_tokens": 5,
    }
    chain = make_chain(depth=3)
    outputs = [run_model(chain, AttentionSpec(backend=backend, **sizes)) for backend in ("flash", "sdpa")]
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)
    assert flash_attn.calls == []
    assert [record.message for record in caplog.records if "uses sdpa" in record.message] == [
        "attention_backend flash takes (torch.float16, torch.bfloat16) on CUDA; torch.float64 on cpu uses sdpa instead"
    ]
