"""A generation layer: transformers' decoder layer of each family where nothing is added, and Eq. 3 and the figure written out."""

import copy

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

from latte_flow.model.attention import ContextKeyValues
from latte_flow.model.context import encode_context
from latte_flow.model.generation_layer import GenerationLayer
from latte_flow.model.position import rotary_2d
from tests.tiny import FAMILIES, PROMPTS, make_config, make_model, make_vlm, noise, randomise
from tests.tiny import HEAD_DIM as HEAD_DIMS

pytestmark = pytest.mark.usefixtures("flash_attn")

BACKENDS = ("reference", "sdpa", "flash")
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, HEAD_DIMS["qwen2_vl"]
# Where scale_a and scale_m are among the vectors from the time embedding: as in section 5's equations, and as in adaLN-Zero.
OUTPUT_SCALES = {"four": (0, 3), "six": (2, 5)}


def image_positions(side: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(part[None].to(dtype) for part in rotary_2d(side, side, HEAD_DIM))


@pytest.fixture(scope="module")
def vlm():
    return make_vlm(num_layers=2)


@pytest.fixture(scope="module", params=FAMILIES)
def any_vlm(request):
    return make_vlm(num_layers=3, family=request.param)


def make_layer(vlm, layer_idx: int = 0, **changes) -> GenerationLayer:
    """A generation layer with the weights of a VLM layer, not yet modulated."""
    config = make_config(vlm, num_groups=1, **changes)
    layer = GenerationLayer(config, layer_idx, config.attention_spec())
    layer.copy_from(vlm.model.language_model.layers[layer_idx])
    return layer


def neutralise(layer: GenerationLayer) -> None:
    """Make the modulation say: outputs times 1, no shift, no scale."""
    layer.modulation.weight.data.zero_()
    layer.modulation.bias.data.zero_()
    vectors = layer.modulation.bias.data.view(-1, HIDDEN)
    for position in OUTPUT_SCALES[layer.modulation_kind]:
        vectors[position] = 1.0


def mrope(vlm, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    return vlm.model.language_model.rotary_emb(torch.zeros(1, dtype=torch.float64), position_ids)


class TestIsTheVlmsLayer:
    """Without what LaTtE-Flow adds, a copied layer is the layer it was copied from."""

    @pytest.mark.parametrize("modulation", ["four", "six"])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_equals_transformers_decoder_layer(self, any_vlm, backend, modulation):
        vlm = any_vlm
        layer = make_layer(
            vlm, 1, post_norm=False, residual_attention=False, modulation=modulation, attention_backend=backend
        ).double()
        neutralise(layer)
        theirs = copy.deepcopy(vlm.model.language_model.layers[1]).double()
        x = noise(3, 9, HIDDEN).double()
        rng = torch.Generator().manual_seed(0)
        positions = torch.randint(0, 20, (3, 3, 9), generator=rng)  # time, row and column differ
        cos_sin = mrope(vlm, positions)
        ours, residual = layer(x, layer.condition(noise(3, HIDDEN).double()), position_embeddings=cos_sin, causal=True)
        causal = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)[None, None]
        expected = theirs(x, attention_mask=causal, position_embeddings=cos_sin)
        assert residual is None
        # Not 1e-12: both compute the RMS norm and the rotations in float32.
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        assert (expected - x).abs().mean() > 0.1  # the layer does something

    def test_without_a_mask_it_is_bidirectional(self, vlm):
        layer = make_layer(vlm, post_norm=False, residual_attention=False).double()
        neutralise(layer)
        x, cos_sin = noise(2, 9, HIDDEN).double(), mrope(vlm, torch.arange(9).expand(3, 2, -1))
        ours, _ = layer(x, layer.condition(noise(2, HIDDEN).double()), position_embeddings=cos_sin)
        theirs = copy.deepcopy(vlm.model.language_model.layers[0]).double()
        everything = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
        expected = theirs(x, attention_mask=everything, position_embeddings=cos_sin)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)

    def test_has_as_many_parameters_as_the_vlms_layer_and_the_modulation(self, any_vlm):
        ours = sum(p.numel() for p in make_layer(any_vlm, post_norm=False, residual_attention=False).parameters())
        theirs = sum(p.numel() for p in any_vlm.model.language_model.layers[0].parameters())
        assert ours == theirs + HIDDEN * 4 * HIDDEN + 4 * HIDDEN

    def test_copies_weights_and_does_not_alias_them(self, vlm):
        layer = make_layer(vlm)
        before = {name: p.clone() for name, p in vlm.named_parameters()}
        randomise(layer)
        assert all(torch.equal(p, before[name]) for name, p in vlm.named_parameters())

    def test_refuses_a_layer_of_another_shape(self, vlm):
        config = copy.deepcopy(vlm.config.text_config)
        config.intermediate_size = 128
        with pytest.raises(RuntimeError, match="size mismatch"):
            make_layer(vlm).copy_from(Qwen2VLDecoderLayer(config, 0))


@pytest.mark.parametrize("kind", PROMPTS)
def test_projected_context_is_the_vlms_keys_and_values(any_vlm, kind):
    """Against the cache of a plain forward pass of transformers, which finds mask and positions on its own."""
    vlm, inputs = any_vlm, PROMPTS[kind]()
    model = make_model(vlm, num_groups=3, random=False)
    context = encode_context(vlm, inputs, "generation")
    projected = model.project_context(context)
    cache = vlm(**inputs, use_cache=True).past_key_values
    real = inputs["attention_mask"].bool()
    assert set(projected) == {0, 1, 2}
    if kind == "pictures":  # otherwise the test would not see a mix-up of time, row and column
        assert (context.position_ids[0] != context.position_ids[1]).any()
        assert (context.position_ids[1] != context.position_ids[2]).any()
    for index, layer in enumerate(cache.layers):
        for ours, theirs in ((projected[index].key, layer.keys), (projected[index].value, layer.values)):
            assert ours.shape == theirs.shape == (len(real), KV_HEADS, real.shape[1], HEAD_DIMS[vlm.config.model_type])
            ours, theirs = (x.transpose(1, 2)[real] for x in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(projected[index].mask, real)


@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("modulation", ["four", "six"])
def test_a_new_layer_is_the_identity(vlm, modulation, post_norm):
    model = make_model(vlm, random=False, num_groups=1, modulation=modulation, post_norm=post_norm)
    x = noise(2, 16, HIDDEN)
    for layer in model.layers:
        out, _ = layer(x, layer.condition(noise(2, HIDDEN)), position_embeddings=image_positions())
        assert torch.equal(out, x)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + E/2) of [B, T, E] as complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(*(part[..., :half] for part in cos_sin))
    return torch.cat([turned.real, turned.imag], dim=-1)


def layer_by_hand(layer, x, h, cos_sin, context, context_cos_sin, mask, previous_map):
    """Section 5's equations and Eq. 3 for ``modulation: four``, head by head.

    Returns the new tokens and the layer's own map [B, H, N, N].
    """
    weight = dict(layer.named_parameters())
    silu = h / (1 + (-h).exp())
    vectors = silu @ weight["modulation.weight"].T + weight["modulation.bias"]
    scale_a, scale, shift, scale_m = (v[:, None] for v in vectors.view(len(x), 4, -1).unbind(1))

    def project(states, name, head):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        return states @ weight[f"{name}.weight"][rows].T + weight[f"{name}.bias"][rows]

    normalised, heads, maps = rms(x, weight["input_layernorm.weight"]), [], []
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        query = rotate(project(normalised, "q_proj", head), cos_sin)
        key = rotate(project(normalised, "k_proj", group), cos_sin)
        context_key = rotate(project(context, "k_proj", group), context_cos_sin)
        own = query @ key.mT / HEAD_DIM**0.5
        maps.append(own)
        if previous_map is not None:
            gate = (h @ weight["residual_gate.weight"].T).tanh()[:, head, None, None]
            own = own + gate * previous_map[:, head]
        to_context = query @ context_key.mT / HEAD_DIM**0.5
        both = torch.cat([torch.where(mask[:, None], to_context.exp(), 0), own.exp()], dim=-1)
        values = torch.cat([project(context, "v_proj", group), project(normalised, "v_proj", group)], dim=1)
        heads.append(both @ values / both.sum(-1, keepdim=True))
    attended = torch.cat(heads, dim=-1) @ weight["o_proj.weight"].T
    x = x + scale_a * rms(attended, weight["attention_post_norm.weight"])
    inner = (1 + scale) * rms(x, weight["post_attention_layernorm.weight"]) + shift
    gate, up = inner @ weight["mlp.gate_proj.weight"].T, inner @ weight["mlp.up_proj.weight"].T
    mlp = (gate / (1 + (-gate).exp()) * up) @ weight["mlp.down_proj.weight"].T
    return x + scale_m * rms(mlp, weight["mlp_post_norm.weight"]), torch.stack(maps, dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_of_two_layers_equals_the_papers_equations(vlm, backend):
    """Norms, modulation, joint attention over a padded context, gated residual maps, MLP, all written out."""
    model = make_model(vlm, num_groups=1, attention_backend=backend).double()
    x, h = noise(3, 16, HIDDEN).double(), noise(3, HIDDEN, seed=8).double()
    context, mask = noise(3, 5, HIDDEN, seed=9).double(), torch.arange(5) < torch.tensor([5, 3, 0])[:, None]
    cos_sin = image_positions(dtype=torch.float64)
    positions = torch.randint(0, 9, (3, 3, 5), generator=torch.Generator().manual_seed(0))
    context_cos_sin = mrope(vlm, positions)
    ours = theirs = x
    previous = previous_map = None
    for layer in model.layers:
        key_values = layer.project_context(context, mask, context_cos_sin)
        ours, previous = layer(
            ours, layer.condition(h), position_embeddings=cos_sin, context=key_values, previous=previous
        )
        theirs, previous_map = layer_by_hand(layer, theirs, h, cos_sin, context, context_cos_sin, mask, previous_map)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_residual_map_changes_the_layers_output(vlm, backend):
    """What the test above compares is not lost in the tolerance: without its gate the second layer answers differently."""
    first, second = make_model(vlm, num_groups=1, attention_backend=backend).layers
    x, h = noise(3, 16, HIDDEN), noise(3, HIDDEN, seed=8)
    _, previous = first(x, first.condition(h), position_embeddings=image_positions())
    gated, _ = second(x, second.condition(h), position_embeddings=image_positions(), previous=previous)
    second.residual_gate.weight.data.zero_()
    plain, _ = second(x, second.condition(h), position_embeddings=image_positions(), previous=previous)
    without, _ = second(x, second.condition(h), position_embeddings=image_positions())
    assert (plain - gated).abs().max() > 1e-2
    torch.testing.assert_close(plain, without)


def test_six_vectors_shift_and_scale_the_attentions_input_too(vlm):
    """adaLN-Zero: with the VLM's input norm set to one and no scale, shift c equals a normed input moved by c."""
    layer = make_layer(vlm, post_norm=False, residual_attention=False, modulation="six").double()
    neutralise(layer)
    cos_sin = image_positions(3, torch.float64)
    x, h = noise(2, 9, HIDDEN).double(), noise(2, HIDDEN).double()
    shift, scale = noise(2, HIDDEN, seed=1).double()
    layer.modulation.bias.data.view(6, HIDDEN)[:2] = torch.stack([shift, scale])
    ours, _ = layer(x, layer.condition(h), position_embeddings=cos_sin)

    class Shifted(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) * (1 + scale) + shift

    theirs = copy.deepcopy(vlm.model.language_model.layers[0]).double()
    theirs.input_layernorm = Shifted(theirs.input_layernorm)
    everything = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    expected = theirs(x, attention_mask=everything, position_embeddings=cos_sin)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("modulation", ["four", "six"])
def test_conditioning_may_be_computed_ahead_for_a_schedule(vlm, modulation):
    """One call for all time embeddings of a schedule, then a row of it at each step."""
    layer = make_model(vlm, num_groups=1, modulation=modulation).layers[1]
    schedule, x = noise(6, HIDDEN), noise(1, 16, HIDDEN, seed=2)
    ahead = layer.condition(schedule)
    position_embeddings = image_positions()
    _, previous = layer(x, layer.condition(schedule[:1]), position_embeddings=position_embeddings)
    for step, h in enumerate(schedule):
        row = type(ahead)(**{k: None if v is None else v[step : step + 1] for k, v in vars(ahead).items()})
        outputs = [
            layer(x, conditioning, position_embeddings=position_embeddings, previous=previous)[0]
            for conditioning in (row, layer.condition(h[None]))
        ]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_the_first_layer_of_a_group_has_no_gate():
    model = make_model(make_vlm(num_layers=4), num_groups=2, random=False)
    assert [layer.residual_gate is None for layer in model.layers] == [True, False, True, False]
    assert model.layers[1].residual_gate.weight.shape == (HEADS, HIDDEN)
    assert not model.layers[1].residual_gate.weight.any()


def test_an_image_token_sees_every_real_context_token_and_no_padding(vlm):
    layer = make_model(vlm, num_groups=1).layers[0]
    x, key_values = noise(1, 16, HIDDEN), noise(2, 1, KV_HEADS, 4, HEAD_DIM, seed=3)
    mask = torch.tensor([[True, False, True, True]])

    def run(key_values):
        context = ContextKeyValues(*key_values, mask)
        conditioning = layer.condition(noise(1, HIDDEN, seed=4))
        return layer(x, conditioning, position_embeddings=image_positions(), context=context)[0]

    plain = run(key_values)
    for token in range(4):
        changed = key_values.clone()
        changed[..., token, :] += 1
        moved = (run(changed) - plain).abs().amax(-1)[0]
        assert (moved > 1e-5).all() if mask[0, token] else (moved == 0).all()
