"""The network: which layers run when, what training and sampling share, what is saved, what Blend shares with its VLM."""

import copy
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

from latte_flow.model.backbone import load_vlm
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.context import encode_context
from latte_flow.model.flow_matching import flow_matching_loss
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.sampling import sample_latents
from latte_flow.model.tiny_vlm import build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from tests.tiny import PROMPTS, make_config, make_model, make_vlm, noise, randomise, text_prompts, vlm_config

LAYERS = 8
PAPER = {
    "vlm_config": Qwen2VLConfig(
        text_config={
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"hidden_size": 1536},
        tie_word_embeddings=True,
    ),
    "latent_channels": 32,
    "latent_size": (8, 8),
}


@pytest.fixture(scope="module")
def vlm():
    return make_vlm(LAYERS)


@pytest.fixture(scope="module")
def small_vlm():
    return make_vlm(4)


def count(modules) -> int:
    """Number of distinct parameters of modules."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


class Trace:
    """Names of the leaf modules that run in each sampling step, ``steps[i]``, and before the first one, ``before``."""

    def __init__(self, model: LatteFlowModel):
        self.before, self.steps = [], []
        self.hooks = [
            module.register_forward_hook(lambda *_, name=name: self._now().append(name))
            for name, module in model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]

    def _now(self):
        return self.steps[-1] if self.steps else self.before

    def progress(self, steps):
        for step in steps:
            self.steps.append([])
            yield step


def paper_group(step: int, num_steps: int, num_groups: int) -> int:
    """The group at a sampling step: how many of linspace(1000, 1, K + 1)'s inner boundaries tau has reached."""
    tau = 1000 - 1000 * step / num_steps
    return sum(tau <= 1000 - k * 999 / num_groups for k in range(1, num_groups))


class TestStrictExperts:
    @pytest.mark.parametrize("group_io", ["shared", "per_group"])
    @pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
    def test_each_of_40_steps_runs_the_modules_of_its_group_and_no_other(self, vlm, num_groups, group_io):
        model = make_model(vlm, num_groups=num_groups, group_io=group_io)
        context, trace = encode_context(vlm, text_prompts((4,)), "generation"), Trace(model)
        sample_latents(model, noise(1), context, progress=trace.progress)
        assert len(trace.steps) == 40
        size = LAYERS // num_groups
        names = {name for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
        for step, ran in enumerate(trace.steps):
            group = paper_group(step, 40, num_groups)
            io = group if group_io == "per_group" else 0
            layers = range(group * size, (group + 1) * size)
            prefixes = (f"image_io.{io}.", *(f"layers.{i}." for i in layers))
            assert set(ran) == {name for name in names if name.startswith(prefixes)}
            assert len(ran) == len(set(ran))  # each of them once
            assert sum(name.endswith(".mlp.down_proj") for name in ran) == size  # M layers
        owners = [paper_group(step, 40, num_groups) for step in range(40)]
        assert [owners.count(k) for k in range(num_groups)] == [40 // num_groups] * num_groups

    def test_context_is_projected_once_per_sampling(self, vlm):
        model = make_model(vlm, num_groups=4)
        context, null = (encode_context(vlm, text_prompts(n), "generation") for n in ((6, 5), (3,)))
        lengths = []
        for layer in model.layers:
            for projection in (layer.k_proj, layer.v_proj):
                projection.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
        sample_latents(model, noise(2), context, null, cfg_scale=3.0)
        # 6 context tokens: once for keys, once for values, at each layer; 16 image tokens: each step's 2 layers
        assert lengths.count(6) == 2 * LAYERS
        assert lengths.count(16) == 2 * 2 * 40
        assert len(lengths) == 2 * LAYERS + 2 * 2 * 40

    @pytest.mark.parametrize("group", range(4))
    def test_a_group_does_not_look_at_other_groups_weights(self, vlm, group):
        """All other groups' weights and their contexts are NaN."""
        model = make_model(vlm, num_groups=4, group_io="per_group")
        key_values = model.project_context(encode_context(vlm, text_prompts(), "generation"))
        inputs = noise(3), torch.full((3,), 400.0)
        expected, _ = model.forward_group(*inputs, key_values, group)
        with torch.no_grad():
            for index, layer in enumerate(model.layers):
                if index // 2 != group:
                    for parameter in layer.parameters():
                        parameter.fill_(float("nan"))
            for k, io in enumerate(model.image_io):
                if k != group:
                    for parameter in io.parameters():
                        parameter.fill_(float("nan"))
        own = {index: key_values[index] for index in (2 * group, 2 * group + 1)}
        assert torch.equal(model.forward_group(*inputs, own, group)[0], expected)

    def test_activated_parameters_are_those_a_step_touches(self, vlm):
        for variant, num_groups in itertools.product(("couple", "blend"), (1, 4)):
            model = make_model(vlm, variant=variant, num_groups=num_groups)
            with torch.no_grad():  # the graph holds the step alone, not the context's projection
                key_values = model.project_context(encode_context(vlm, text_prompts(), "generation"))
            model.forward_group(noise(3), torch.full((3,), 900.0), key_values, 0)[0].square().sum().backward()
            touched = sum(p.numel() for p in model.parameters() if p.grad is not None)
            assert model.activated_parameters() == touched


class TestGuidance:
    def test_doubled_batch_equals_two_separate_calls(self, vlm):
        """v = v_null + s (v_cond - v_null), Euler by hand with one network call for each of the two."""
        model = make_model(vlm, num_groups=2)
        context, null = (encode_context(vlm, text_prompts(n), "generation") for n in ((6, 3), (4,)))
        x = noise(2)
        ours = sample_latents(model, x, context, null, num_steps=4, cfg_scale=2.5)
        conditional, unconditional = model.project_context(context), model.project_context(null)
        with torch.no_grad():
            for step in range(4):
                tau, group = torch.full((2,), 1000 - 250.0 * step), paper_group(step, 4, 2)
                v_cond = model.forward_group(x, tau, conditional, group)[0]
                v_null = torch.cat(
                    [model.forward_group(x[i : i + 1], tau[:1], unconditional, group)[0] for i in (0, 1)]
                )
                x = x + (v_null + 2.5 * (v_cond - v_null)) / 4
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
        assert (v_cond - v_null).abs().max() > 1e-2

    def test_scale_one_runs_the_conditional_model_alone(self, vlm):
        model = make_model(vlm, num_groups=2)
        context, null = (encode_context(vlm, text_prompts(n), "generation") for n in ((6, 3), (4,)))
        plain = sample_latents(model, noise(2), context, num_steps=4)
        assert torch.equal(plain, sample_latents(model, noise(2), context, null, num_steps=4, cfg_scale=1.0))
        nearly = sample_latents(model, noise(2), context, null, num_steps=4, cfg_scale=1.0 + 1e-6)
        torch.testing.assert_close(nearly, plain, rtol=1e-3, atol=1e-3)

    def test_scale_zero_is_the_null_prompt(self, vlm):
        model = make_model(vlm, num_groups=2)
        context, null = (encode_context(vlm, text_prompts(n), "generation") for n in ((6, 3), (4,)))
        ours = sample_latents(model, noise(2), context, null, num_steps=4, cfg_scale=0.0)
        unconditional = sample_latents(model, noise(2), null.gather(torch.tensor([0, 0])), num_steps=4)
        torch.testing.assert_close(ours, unconditional, rtol=1e-4, atol=1e-4)

    def test_without_a_null_prompt_is_refused(self, vlm):
        context = encode_context(vlm, text_prompts((3,)), "generation")
        with pytest.raises(ValueError, match="cfg_scale: guidance needs the null prompt"):
            sample_latents(make_model(vlm), noise(1), context, cfg_scale=2.0)


class TestTrainingForward:
    ROWS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1])

    @pytest.mark.parametrize("projection", ["generation", "vlm"])
    @pytest.mark.parametrize("num_groups", [1, 2, 4])
    def test_part_k_is_group_k_on_that_part(self, vlm, num_groups, projection):
        model = make_model(vlm, num_groups=num_groups, context_projection=projection)
        x, tau = noise(8), torch.linspace(990, 5, 8)
        context = encode_context(vlm, text_prompts(), projection)
        velocity = model(x, tau, context=context, context_rows=self.ROWS)
        size = 8 // num_groups
        for group in range(num_groups):
            part = slice(group * size, (group + 1) * size)
            key_values = model.project_context(context.gather(self.ROWS[part]))
            expected, _ = model.forward_group(x[part], tau[part], key_values, group)
            torch.testing.assert_close(velocity[part], expected, rtol=1e-5, atol=1e-5)

    def test_a_batch_that_the_groups_do_not_share_equally_is_refused(self, vlm):
        context = encode_context(vlm, text_prompts(), "generation")
        with pytest.raises(ValueError, match="noisy_latents: got 6; accepted: a multiple of num_groups 4"):
            make_model(vlm, num_groups=4)(noise(6), torch.ones(6), context=context, context_rows=torch.zeros(6).long())

    @pytest.mark.parametrize("group", range(4))
    def test_a_parts_loss_gives_no_gradient_to_other_groups(self, vlm, group):
        model = make_model(vlm, num_groups=4, group_io="per_group")
        context = encode_context(vlm, text_prompts(), "generation")
        model(noise(8), torch.linspace(990, 5, 8), context=context, context_rows=self.ROWS)[
            2 * group : 2 * group + 2
        ].square().sum().backward()
        for name, parameter in model.named_parameters():
            kind, index, *_ = name.split(".")
            owner = int(index) // 2 if kind == "layers" else int(index)
            gradient = 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
            assert (gradient > 0) == (owner == group), name

    def test_blend_computes_its_context_itself(self, vlm):
        """From its own VLM, which may have been trained away from the one it started from."""
        model = make_model(vlm, variant="blend")
        prompts, arguments = text_prompts(), (noise(8), torch.linspace(990, 5, 8))
        ours = model(*arguments, context_rows=self.ROWS, prompt_inputs=prompts)
        context = encode_context(model.vlm, prompts, "generation")
        assert torch.equal(ours, model(*arguments, context=context, context_rows=self.ROWS))
        stale = encode_context(vlm, prompts, "generation")
        assert not torch.allclose(ours, model(*arguments, context=stale, context_rows=self.ROWS), atol=1e-2)

    def test_couple_has_no_vlm_to_compute_a_context_with(self, vlm):
        with pytest.raises(ValueError, match="context: a Couple model holds no VLM"):
            make_model(vlm)(noise(4), torch.ones(4), context_rows=torch.zeros(4).long(), prompt_inputs=text_prompts())

    @pytest.mark.parametrize("kind", PROMPTS)
    def test_velocity_depends_on_image_time_and_prompt(self, vlm, kind):
        model = make_model(vlm, num_groups=4)
        context = encode_context(vlm, PROMPTS[kind](), "generation")

        def run(x, tau, row):
            key_values = model.project_context(context.gather(torch.tensor([row])))
            return model.forward_group(x, torch.tensor([tau]), key_values, 1)[0]

        plain = run(noise(1), 600.0, 0)
        for other in (run(noise(1, seed=1), 600.0, 0), run(noise(1), 640.0, 0), run(noise(1), 600.0, 1)):
            assert (plain - other).abs().max() > 1e-2

    def test_image_tokens_know_their_place(self, vlm):
        """Without the 2D positions, a network of attention and pointwise layers would be blind to a permutation of pixels."""
        model = make_model(vlm, num_groups=1)
        key_values = model.project_context(encode_context(vlm, text_prompts((3,)), "generation"))
        x = noise(1)
        for dims in (2, 3):
            flipped = model.forward_group(x.flip(dims), torch.tensor([600.0]), key_values, 0)[0].flip(dims)
            assert (flipped - model.forward_group(x, torch.tensor([600.0]), key_values, 0)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["couple", "blend"])
@pytest.mark.parametrize("group_io", ["shared", "per_group"])
def test_a_new_model_predicts_zero_velocity(vlm, variant, group_io):
    model = make_model(vlm, variant=variant, group_io=group_io, random=False)
    key_values = model.project_context(encode_context(vlm, text_prompts(), "generation"))
    for group in range(4):
        velocity, _ = model.forward_group(noise(3), torch.full((3,), 500.0), key_values, group)
        assert velocity.shape == (3, 3, 4, 4)
        assert not velocity.any()


def test_patches_tile_the_latent(small_vlm):
    """With patch 2 a 4 x 4 latent is 4 tokens; a head that is the embedding's inverse gives the latent back."""
    model = make_model(small_vlm, patch_size=2, num_groups=1)
    io = model.image_io[0]
    assert io.embed(noise(2)).shape == (2, 4, 64)
    with torch.no_grad():
        for parameter in (*io.head_modulation.parameters(), io.patch_embed.bias, io.head.bias):
            parameter.zero_()
        io.head.weight.copy_(torch.linalg.pinv(io.patch_embed.weight))
    io.head_norm = nn.Identity()
    torch.testing.assert_close(io.predict(io.embed(noise(2)), torch.zeros(2, 64)), noise(2), rtol=1e-4, atol=1e-4)


class TestSaveAndLoad:
    COMBINATIONS = (
        {},
        {"group_io": "per_group", "modulation": "six", "context_projection": "vlm"},
        {"residual_attention": False, "num_groups": 1, "post_norm": False},
        {"variant": "blend"},
        {"variant": "blend", "group_io": "per_group", "context_projection": "vlm", "modulation": "six"},
        {"variant": "blend", "shared_modules": ["mlp", "input_layernorm", "k_proj"], "post_norm": False},
        {"variant": "blend", "shared_modules": []},
        {"timestep_boundaries": [1000, 600, 300, 100, 0], "timestep_overlap": 30.0, "patch_size": 2, "rope_2d_theta": 50.0},
    )  # fmt: skip

    @pytest.mark.parametrize("load", [LatteFlowModel.from_pretrained, AutoModel.from_pretrained], ids=["own", "auto"])
    @pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda c: ",".join(map(str, c.values())) or "default")
    def test_round_trip_is_bit_identical(self, small_vlm, changes, load, tmp_path):
        model = make_model(small_vlm, **changes)
        model.save_pretrained(tmp_path)
        loaded = load(tmp_path)
        assert type(loaded) is LatteFlowModel
        assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
        for field in (*LatteFlowConfig().to_dict().keys() & vars(model.config).keys(), *changes):
            if field not in ("vlm_config", "transformers_version", "architectures", "dtype", "_name_or_path"):
                assert getattr(loaded.config, field) == getattr(model.config, field), field
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
        context = encode_context(small_vlm, text_prompts(), model.config.context_projection)
        arguments = {"context": context, "context_rows": torch.tensor([0, 1, 2, 1])}
        # The file's weights lie in memory at addresses on which the CPU's kernels sum in another order: move them.
        loaded = copy.deepcopy(loaded).eval()
        with torch.no_grad():
            velocities = [m(noise(4), torch.linspace(900, 9, 4), **arguments) for m in (model, loaded)]
        assert torch.equal(*velocities)

    @pytest.mark.parametrize("load", [LatteFlowModel.from_pretrained, AutoModel.from_pretrained], ids=["own", "auto"])
    def test_a_folder_that_says_flash_loads_where_there_is_none(self, small_vlm, load, tmp_path):
        """A downloaded one too, whose path is a hub id: its configuration is read by transformers alone."""
        make_model(small_vlm).save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_backend": "flash"}))
        assert load(tmp_path).config.attention_spec().backend == "reference"
        assert LatteFlowConfig.from_pretrained(tmp_path).attention_spec().backend == "reference"
        chosen = LatteFlowConfig.from_pretrained(tmp_path, attention_backend="sdpa")
        assert chosen.attention_spec().backend == "sdpa"

    def test_a_weight_is_saved_once(self, small_vlm, tmp_path):
        model = make_model(small_vlm, variant="blend")
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            saved = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        assert saved == count([model])

    def test_missing_weights_are_refused_in_a_folder_and_get_initial_values_from_a_state_dict(
        self, small_vlm, tmp_path
    ):
        """Weights without gates, loaded into a model that has them, start from gates of zero and keep the rest."""
        model = make_model(small_vlm, num_groups=1, residual_attention=False)
        model.config.residual_attention = True
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"weights: 3 missing: layers\.1\.residual_gate\.weight"):
            LatteFlowModel.from_pretrained(tmp_path)
        loaded = LatteFlowModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
        assert not any(layer.residual_gate.weight.any() for layer in loaded.layers[1:])
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, loaded.get_parameter(name)), name

    def test_building_from_another_vlm_names_the_field(self, small_vlm):
        with pytest.raises(ValueError, match="num_hidden_layers: 8 differs from the VLM's 4"):
            LatteFlowModel.from_vlm(small_vlm, make_config(make_vlm(8)))


class TestBlend:
    SHARED = ("q_proj", "k_proj", "v_proj", "o_proj")

    @pytest.mark.parametrize("copied", [False, True], ids=["new", "deepcopy"])
    def test_shared_modules_are_the_vlms_own(self, small_vlm, copied):
        model = make_model(small_vlm, variant="blend")
        if copied:
            original, model = model, copy.deepcopy(model)
            assert not {id(p) for p in model.parameters()} & {id(p) for p in original.parameters()}
        for layer, vlm_layer in zip(model.layers, model.vlm.model.language_model.layers, strict=True):
            for name in self.SHARED:
                assert layer.part(name) is getattr(vlm_layer.self_attn, name)
            assert layer.part("mlp") is not vlm_layer.mlp
            assert layer.part("input_layernorm") is not vlm_layer.input_layernorm

    def test_a_change_of_a_shared_weight_reaches_both_paths(self, small_vlm):
        """In a deep copy too."""
        model = copy.deepcopy(make_model(small_vlm, variant="blend"))
        prompts = text_prompts()

        def run():
            context = encode_context(model.vlm, prompts, "generation")
            generated = model.forward_group(noise(3), torch.full((3,), 900.0), model.project_context(fixed), 0)[0]
            return context.states[1], generated

        fixed = encode_context(small_vlm, prompts, "generation")
        before = run()
        model.vlm.model.language_model.layers[0].self_attn.o_proj.weight.data.add_(0.3)
        after = run()
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(before, after, strict=True))

    def test_no_parameter_has_two_names(self, small_vlm):
        model = make_model(small_vlm, variant="blend")
        with_names = list(model.named_parameters(remove_duplicate=False))
        tied = {"vlm.lm_head.weight"}
        assert len({id(p) for _, p in with_names}) == len([n for n, _ in with_names if n not in tied])
        generation = [name for name in model.state_dict() if name.startswith("layers.")]
        assert not any(f".{shared}." in name for name in generation for shared in self.SHARED)

    def test_has_the_vlms_parameters_and_those_not_shared(self, small_vlm):
        """What Blend saves against Couple with the VLM beside it are exactly the shared projections."""
        couple, blend = (make_model(small_vlm, variant=v) for v in ("couple", "blend"))
        projections = [getattr(layer, name) for layer in couple.layers for name in self.SHARED]
        assert count([blend]) == count([couple, small_vlm]) - count(projections)

    def test_starts_from_the_vlm(self, small_vlm):
        model = make_model(small_vlm, variant="blend", random=False)
        for name, parameter in small_vlm.named_parameters():
            assert torch.equal(parameter, model.vlm.get_parameter(name)), name


def loss_of(model: LatteFlowModel, vlm) -> torch.Tensor:
    """The flow-matching loss of a batch in which every group sees every prompt."""
    rows = torch.arange(3).repeat(4)
    taus = torch.tensor([900.0, 600.0, 400.0, 100.0]).repeat_interleave(3)
    if model.config.variant == "blend":
        arguments = {"prompt_inputs": text_prompts()}
    else:
        arguments = {"context": encode_context(vlm, text_prompts(), model.config.context_projection)}
    velocity = model(noise(12), taus, context_rows=rows, **arguments)
    return flow_matching_loss(velocity, noise(12, seed=1), noise(12, seed=2)).mean()


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "blend", "shared_modules": shared, "context_projection": projection}
        for projection in ("generation", "vlm")
        for shared in (["q_proj", "k_proj", "v_proj", "o_proj"], ["mlp", "o_proj"], ["input_layernorm"], [])
    ]
    + [{"variant": "couple", "context_projection": projection} for projection in ("generation", "vlm")],
    ids=lambda c: f"{c['variant']}-{c['context_projection']}-{'+'.join(c.get('shared_modules', ()))}",
)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_exactly_the_parameters_the_loss_reaches_stay_trainable(family, changes):
    small_vlm = make_vlm(num_layers=4, family=family)
    model = make_model(small_vlm, **changes)
    loss_of(model, small_vlm).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for name in model.unreached_parameters():
        model.get_parameter(name).requires_grad_(False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == reached
    if changes["variant"] == "blend":
        assert any(name.startswith("vlm.model.visual") for name, _ in model.named_parameters())
        assert "vlm.model.language_model.embed_tokens.weight" in reached
    model.zero_grad()
    loss_of(model, small_vlm).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == reached


def test_vanilla_is_one_group_without_gates(vlm):
    model = make_model(vlm, num_groups=1, residual_attention=False)
    assert not any("residual_gate" in name for name, _ in model.named_parameters())
    assert model.gate_values(torch.tensor([500.0])) == {}
    key_values = model.project_context(encode_context(vlm, text_prompts(), "generation"))
    _, residuals = model.forward_group(noise(3), torch.full((3,), 500.0), key_values, 0)
    assert residuals == dict.fromkeys(range(LAYERS))


class TestGates:
    def test_values_are_those_that_the_layers_use(self, vlm):
        model = make_model(vlm, num_groups=2, group_io="per_group")
        used = {}
        for index, layer in enumerate(model.layers):
            if layer.residual_gate is not None:
                layer.residual_gate.register_forward_hook(lambda _, __, out, i=index: used.update({i: out.tanh()}))
        taus = torch.tensor([900.0, 500.0, 20.0])
        key_values = model.project_context(encode_context(vlm, text_prompts(), "generation"))
        for group in (0, 1):
            model.forward_group(noise(3), taus, key_values, group)
        seen = dict(used)
        gates = model.gate_values(taus)
        assert sorted(gates) == [1, 2, 3, 5, 6, 7]  # not the first layer of a group
        for index, values in gates.items():
            assert values.shape == (3, 4)
            torch.testing.assert_close(values, seen[index])
            assert values.abs().max() < 1

    def test_start_at_zero(self, vlm):
        assert not any(g.any() for g in make_model(vlm, random=False).gate_values(torch.rand(5) * 1000).values())


class TestPrecision:
    @pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)], ids=["method", "to"])
    @pytest.mark.parametrize("variant", ["couple", "blend"])
    def test_rotary_frequencies_stay_float32_and_exact(self, small_vlm, variant, cast):
        model = cast(make_model(small_vlm, variant=variant))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        # theta^(-2j / head_dim)
        exact = 50.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
        rotaries = [m for name, m in model.named_modules() if hasattr(m, "inv_freq") and "visual" not in name]
        assert len(rotaries) == {"couple": 1, "blend": 2}[variant]
        for rotary in rotaries:
            assert rotary.inv_freq.dtype == torch.float32
            torch.testing.assert_close(rotary.inv_freq.double(), exact, rtol=1e-6, atol=0)
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                assert module.inv_freq.dtype == torch.float32

    @pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half()], ids=["bfloat16", "half"])
    @pytest.mark.parametrize("variant", ["couple", "blend"])
    def test_positions_survive_a_cast_and_back(self, small_vlm, variant, cast):
        model = make_model(small_vlm, variant=variant)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert {"image_cos", "image_sin", "context_rotary.inv_freq"} <= before.keys()
        after = dict(cast(model).float().named_buffers())
        assert [name for name, buffer in before.items() if not torch.equal(buffer, after[name])] == []

    @pytest.mark.parametrize("dtype", ["bfloat16", None], ids=["vlm_config-bf16", "vlm_config-silent"])
    @pytest.mark.parametrize("build", ["from_pretrained", "from_vlm", "float32"])
    def test_a_blend_of_a_bfloat16_export_has_one_type(self, small_vlm, tmp_path, build, dtype):
        """Whatever type its VLM's configuration remembers."""
        vlm = copy.deepcopy(small_vlm).bfloat16()
        vlm.config.dtype = dtype
        model = LatteFlowModel.from_vlm(vlm, make_config(vlm, variant="blend"))
        if build != "from_vlm":
            model.bfloat16().save_pretrained(tmp_path)
            model = LatteFlowModel.from_pretrained(tmp_path, **({"dtype": "float32"} if build == "float32" else {}))
        expected = torch.bfloat16 if build == "from_pretrained" else torch.float32
        assert {p.dtype for p in model.parameters()} == {expected}
        rows = {"context_rows": torch.arange(4) % 3, "prompt_inputs": text_prompts()}
        assert model(noise(4), torch.tensor([900.0, 600.0, 400.0, 100.0]), **rows).dtype == expected

    def test_bfloat16_is_close_to_float32(self, small_vlm):
        model = make_model(small_vlm, num_groups=1)
        context = encode_context(small_vlm, text_prompts(), "generation")
        arguments = {"context": context, "context_rows": torch.tensor([0, 1, 2])}
        exact = model(noise(3), torch.tensor([900.0, 500, 100]), **arguments)
        rough = copy.deepcopy(model).bfloat16()(noise(3), torch.tensor([900.0, 500, 100]), **arguments)
        assert rough.dtype == torch.bfloat16
        assert ((rough - exact).norm() / exact.norm()).item() < 0.05

    def test_time_embedding_tells_neighbouring_timesteps_apart_in_bfloat16(self, small_vlm):
        """998 and 999 are one number in bfloat16: the sinusoids must be computed before the cast."""
        io = make_model(small_vlm).bfloat16().image_io[0]
        a, b = io.embed_time(torch.tensor([998.0, 999.0]))
        assert (a - b).abs().max() > 0


class TestFrozenVlm:
    """Couple leaves the VLM what it was: understanding is untouched."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("vlm")
        tokenizer = build_tiny_tokenizer(["What is it?", "A red apple."], vocab_size=300)
        sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = tiny_vlm_config(tokenizer, **sizes, intermediate_size=64, initializer_range=0.3)
        build_tiny_vlm(config, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def test_answers_as_a_fresh_qwen2_vl_from_the_same_folder(self, folder):
        vlm, tokenizer = load_vlm(folder)
        assert type(vlm) is Qwen2VLForConditionalGeneration
        model = make_model(vlm.requires_grad_(False), num_groups=2)
        prompts = tokenizer(["What is it?", "A red apple."], return_tensors="pt", padding=True, padding_side="left")
        encode_context(vlm, dict(prompts), "generation")
        # a training step of the generation path
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        context = encode_context(vlm, dict(prompts), "generation")
        model(
            noise(2), torch.tensor([900.0, 100.0]), context=context, context_rows=torch.tensor([0, 1])
        ).sum().backward()
        optimizer.step()

        fresh = Qwen2VLForConditionalGeneration.from_pretrained(folder)
        for name, parameter in fresh.named_parameters():
            assert torch.equal(parameter, vlm.get_parameter(name)), name
        ours, theirs = (v.generate(**prompts, max_new_tokens=12, do_sample=False) for v in (vlm, fresh))
        assert torch.equal(ours, theirs)
        assert ours.shape[1] > prompts["input_ids"].shape[1]
        tokens = AutoTokenizer.from_pretrained(folder)(["What is it?"])["input_ids"]
        assert tokens == tokenizer(["What is it?"])["input_ids"]


class TestPaperSize:
    """Qwen2-VL-2B, on the meta device: counts, against transformers and against paper.md's section 5."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        with torch.device("meta"):
            return LatteFlowModel(LatteFlowConfig(**PAPER))

    def test_the_vlm_part_of_a_layer_is_qwen2_vls_layer(self, model):
        with torch.device("meta"):
            theirs = count([Qwen2VLDecoderLayer(PAPER["vlm_config"].text_config, 0)])
        layer = model.layers[0]
        added = [layer.modulation, layer.attention_post_norm, layer.mlp_post_norm]
        assert layer.residual_gate is None
        assert count([layer]) - count(added) == theirs
        assert theirs / 1e6 == pytest.approx(46.80, abs=0.005)

    @pytest.mark.parametrize(("modulation", "vectors", "total"), [("four", 0.264, 1.57), ("six", 0.397, 1.71)])
    def test_generation_path_in_billions(self, model, modulation, vectors, total):
        if modulation == "six":
            with torch.device("meta"):
                model = LatteFlowModel(LatteFlowConfig(**PAPER, modulation="six"))
        modulations = count([layer.modulation for layer in model.layers])
        gates = count([layer.residual_gate for layer in model.layers if layer.residual_gate is not None])
        post_norms = count([m for layer in model.layers for m in (layer.attention_post_norm, layer.mlp_post_norm)])
        vlm_shaped = count([model.layers]) - modulations - gates - post_norms
        assert vlm_shaped / 1e9 == pytest.approx(1.310, abs=5e-4)
        assert modulations / 1e9 == pytest.approx(vectors, abs=5e-4)
        assert (vlm_shaped + modulations) / 1e9 == pytest.approx(total, abs=5e-3)
        assert gates == 24 * 1536 * 12  # no gate in the first layer of 4 groups
        print(f"{modulation}: whole generation path {count([model]) / 1e9:.3f} B")

    @pytest.mark.parametrize(("num_groups", "paper"), [(7, "0.3 B"), (4, "500M"), (2, "1 B"), (1, "2.0B")])
    def test_a_step_activates_one_kth_of_the_layers(self, num_groups, paper):
        with torch.device("meta"):
            model = LatteFlowModel(LatteFlowConfig(**PAPER, num_groups=num_groups))
        activated = model.activated_parameters()
        print(
            f"K = {num_groups}: {activated / 1e6:.0f} M parameters a step of {count([model]) / 1e6:.0f} M; paper: {paper}"
        )
        layers = count(model.layers[: 28 // num_groups])
        assert activated == layers + count(model.image_io)
        assert activated / 1e6 == pytest.approx(1574 / num_groups, rel=0.05)

    def test_language_model_of_the_vlm_has_the_published_size(self):
        """paper.md section 8; tied embeddings are counted once."""
        with torch.device("meta"):
            vlm = Qwen2VLForConditionalGeneration(PAPER["vlm_config"])
        assert count([vlm.model.language_model, vlm.lm_head]) == 1_543_714_304


def test_model_over_the_wrong_kind_of_group_names_the_accepted_numbers():
    with pytest.raises(ValueError, match=r"num_groups: 3 does not divide the 8 layers .* 1, 2, 4, 8"):
        LatteFlowConfig(vlm_config=vlm_config(8), num_groups=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variant", "mixed"),
        ("group_io", "own"),
        ("context_projection", "none"),
        ("modulation", "five"),
        ("residual_source", "sum"),
        ("residual_space", "log"),
        ("attention_backend", "fast"),
        ("shared_modules", ["qkv"]),
        ("patch_size", 3),
        ("patch_size", 0),
        ("patch_size", -1),
        ("rope_2d_theta", 0.0),
        ("rope_2d_theta", float("nan")),
        ("timestep_frequencies", 0),
        ("timestep_frequencies", 3),
        ("timestep_boundaries", [1000, 0]),
        ("timestep_overlap", -1.0),
    ],
)
def test_configuration_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        LatteFlowConfig(vlm_config=vlm_config(8), latent_size=(4, 4), **{field: value})


def test_randomise_reaches_every_parameter(small_vlm):
    """The tests above rely on it: a parameter left at zero would hide what it does."""
    model = make_model(small_vlm, random=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    randomise(model)
    assert all((p != before[name]).all() for name, p in model.named_parameters())
