"""LatteFlowPipeline: questions are answered as transformers does it; diffusers and load_pipeline save and load all of it."""

import copy
import json
from types import MappingProxyType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.pipelines import pipeline_utils
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from latte_flow.model.backbone import fingerprint
from latte_flow.model.codecs import load_codec
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.pipeline import LatteFlowPipeline
from latte_flow.model.tiny_vlm import build_tiny_image_processor, build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from latte_flow.training.checkpoint.model_folder import PipelineConfig, save_components
from latte_flow.training.checkpoint.opening import load_pipeline
from latte_flow.training.errors import UserError
from tests.tiny import randomise
from tests.tiny_models import save_tiny_dc_ae

QUESTION = "What is in the picture?"
CODEC = {"kind": "pixel", "image_channels": 3, "patch": 1}


@pytest.fixture(scope="module", params=["couple", "blend"])
def pipeline(request):
    tokenizer = build_tiny_tokenizer([QUESTION, "a red square"])
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    vlm = build_tiny_vlm(tiny_vlm_config(tokenizer, **sizes, intermediate_size=64, initializer_range=0.15), seed=0)
    config = LatteFlowConfig(
        vlm_config=vlm.config, latent_channels=3, latent_size=(4, 4), variant=request.param, num_groups=2
    )
    model = randomise(LatteFlowModel.from_vlm(vlm, config), std=0.05)  # a new one predicts zero
    return LatteFlowPipeline(
        model=model.eval(),
        tokenizer=tokenizer,
        codec=load_codec(**CODEC),
        vlm=vlm if request.param == "couple" else None,
        image_processor=build_tiny_image_processor(vlm.config),
    )


def save_model_folder(pipeline, folder):
    """Write a pipeline as a converted checkpoint is laid out."""
    config = PipelineConfig(resolution=4, image_channels=3, prompt_template="{}", null_prompt="", codec=CODEC)
    parts = {name: getattr(pipeline, name) for name in ("tokenizer", "image_processor", "vlm")}
    save_components(folder, pipeline.model.config, config, **parts)
    pipeline.model.save_pretrained(folder)


def save_and_load(pipeline, folder, layout):
    """Write a pipeline in a layout and load it; "model folder" is that of runs and conversions."""
    if layout == "model folder":
        save_model_folder(pipeline, folder)
        return load_pipeline(folder)
    pipeline.save_pretrained(folder)
    return LatteFlowPipeline.from_pretrained(folder) if layout == "diffusers" else load_pipeline(folder)


def assert_draw_the_same(first, second):
    drawn = [p.generate(["a red square"], num_steps=4, cfg_scale=2.0) for p in (first, second)]
    assert np.array_equal(*drawn)
    assert len(np.unique(drawn[0])) > 1


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (60, 84), colour)


def test_an_answer_is_what_transformers_generates_from_a_prompt_written_out_here(pipeline, tmp_path):
    pipeline.backbone.save_pretrained(tmp_path)
    vlm = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    # 60 x 84 pixels become 56 x 84: 2 x 3 merged patches of 28 pixels.
    text = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 6 + f"<|vision_end|>{QUESTION}<|im_end|>\n"
    inputs = pipeline.tokenizer(text + "<|im_start|>assistant\n", return_tensors="pt")
    inputs |= pipeline.image_processor(images=[picture("red")], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 4]]
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == vlm.config.image_token_id).long()
    output = vlm.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = pipeline.tokenizer.decode(output, skip_special_tokens=True)
    assert pipeline.ask(picture("red"), QUESTION, max_new_tokens=20) == expected
    assert len(expected) > 0


def test_the_picture_and_the_question_matter(pipeline):
    answers = {pipeline.ask(image, QUESTION, max_new_tokens=20) for image in (picture("red"), picture("blue"), None)}
    assert len(answers) == 3
    assert pipeline.ask(None, "a red square", max_new_tokens=20) not in answers


@pytest.mark.parametrize("layout", ["diffusers", "diffusers, by load_pipeline", "model folder"])
def test_a_saved_pipeline_answers_and_draws_the_same(pipeline, tmp_path, layout):
    loaded = save_and_load(pipeline, tmp_path, layout)
    assert loaded.ask(picture("red"), QUESTION) == pipeline.ask(picture("red"), QUESTION)
    assert_draw_the_same(pipeline, loaded)
    assert not any(m.training for m in (loaded.model, loaded.backbone, loaded.codec))
    weights = loaded.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipeline.model.state_dict().items())


@pytest.mark.parametrize("layout", ["diffusers", "model folder"])
def test_a_model_trained_with_flash_loads_where_there_is_none(pipeline, tmp_path, layout):
    save_and_load(pipeline, tmp_path, layout)
    file = tmp_path / ("config.json" if layout == "model folder" else "model/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_backend": "flash"}))
    assert_draw_the_same(pipeline, load_pipeline(tmp_path))


def test_a_picture_without_an_image_processor_is_an_error(pipeline, tmp_path):
    save_model_folder(pipeline, tmp_path)
    (tmp_path / "tokenizer" / "preprocessor_config.json").unlink()
    loaded = load_pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"image: .*preprocessor_config\.json"):
        loaded.ask(picture("red"), QUESTION)
    assert loaded.ask(None, QUESTION) == pipeline.ask(None, QUESTION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_image_does_not_depend_on_the_length_of_the_other_prompts(pipeline, dtype):
    cast = copy.deepcopy(pipeline).to(dtype)
    cast.set_progress_bar_config(disable=True)
    longer = "a red square beside a red square"
    assert len(cast.tokenizer(longer)["input_ids"]) > len(cast.tokenizer("a red square")["input_ids"])
    alone, beside = (
        cast(["a red square", other], seed=4, num_inference_steps=4, output_type="latent").images[0]
        for other in ("a red square", longer)
    )
    assert torch.equal(alone, beside)


class TestAsAPipelineOfDiffusers:
    def test_model_index_names_the_components_and_settings(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        is_couple = pipeline.model.config.variant == "couple"
        components = {
            "model": ["latte_flow.model.latte_flow", "LatteFlowModel"],
            "codec": ["latte_flow.model.codecs", "PixelCodec"],
            "vlm": ["transformers", "Qwen2VLForConditionalGeneration"] if is_couple else [None, None],
            "image_processor": ["transformers", type(pipeline.image_processor).__name__],
            "tokenizer": ["transformers", type(pipeline.tokenizer).__name__],
        }
        settings = {"prompt_template": "{}", "null_prompt": "", "max_prompt_tokens": None, "class_names": None}
        settings |= {"vlm_path": None, "vlm_fingerprint": None, "_class_name": "LatteFlowPipeline"}
        assert {name: value for name, value in index.items() if name != "_diffusers_version"} == components | settings
        folders = {name for name, (library, _) in components.items() if library is not None}
        assert {path.name for path in tmp_path.iterdir()} == {"model_index.json", *folders}
        assert pipeline.components.keys() == components.keys()

    def test_settings_survive_and_can_be_given_when_loading(self, pipeline, tmp_path):
        names = ["red", "blue"]
        settings = {"prompt_template": "draw {}", "null_prompt": "draw", "max_prompt_tokens": 9, "class_names": names}
        LatteFlowPipeline(**pipeline.components, **settings).save_pretrained(tmp_path)
        loaded = LatteFlowPipeline.from_pretrained(tmp_path)
        assert {name: loaded.config[name] for name in settings} == settings
        assert loaded.messages([1, "green"]) == ["draw blue", "draw green"]
        given = LatteFlowPipeline.from_pretrained(tmp_path, model=pipeline.model, class_names=None)
        assert given.model is pipeline.model
        assert given.config.class_names is None

    @pytest.mark.parametrize("layout", ["diffusers", "model folder"])
    def test_a_type_is_that_of_all_networks(self, pipeline, tmp_path, layout):
        save_and_load(pipeline, tmp_path, layout)
        loaded = load_pipeline(tmp_path, dtype=torch.bfloat16)
        assert {loaded.dtype, loaded.model.dtype, loaded.backbone.dtype, loaded.codec.dtype} == {torch.bfloat16}

    def test_a_dc_ae_is_saved_as_diffusers_own(self, pipeline, tmp_path):
        codec = load_codec("dc-ae", path=save_tiny_dc_ae(tmp_path / "dc_ae"))
        LatteFlowPipeline(**pipeline.components | {"codec": codec}).save_pretrained(tmp_path / "saved")
        loaded = LatteFlowPipeline.from_pretrained(tmp_path / "saved").codec
        assert loaded.fingerprint() == codec.fingerprint()
        assert AutoencoderDC.from_pretrained(tmp_path / "saved" / "codec").config.scaling_factor == codec.scaling_factor
        (tmp_path / "saved" / "codec" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"path: cannot load .*codec"):
            LatteFlowPipeline.from_pretrained(tmp_path / "saved")

    def test_a_vlm_with_a_path_of_its_own_is_saved_by_reference(self, pipeline, tmp_path):
        folder, saved = tmp_path / "vlm", tmp_path / "saved"
        pipeline.backbone.save_pretrained(folder)
        reference = {"vlm_path": str(folder), "vlm_fingerprint": fingerprint(folder)}
        referring = LatteFlowPipeline(**pipeline.components, **reference)
        referring.save_pretrained(saved)
        assert referring.vlm is pipeline.vlm
        assert not (saved / "vlm").exists()
        assert json.loads((saved / "model_index.json").read_text())["vlm"] == [None, None]
        assert_draw_the_same(pipeline, LatteFlowPipeline.from_pretrained(saved))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"comment": "another one"}))
        if pipeline.vlm is None:  # a Blend has trained its own
            assert_draw_the_same(pipeline, LatteFlowPipeline.from_pretrained(saved))
            return
        with pytest.raises(ValueError, match=r"path: .* is not the VLM that this model was trained with"):
            LatteFlowPipeline.from_pretrained(saved)
        without = LatteFlowPipeline.from_pretrained(saved, vlm=None)
        with pytest.raises(ValueError, match="vlm: None; a Couple model reads prompts"):
            without("a red square")
        assert_draw_the_same(pipeline, LatteFlowPipeline.from_pretrained(saved, vlm=pipeline.vlm))

    def test_building_one_leaves_the_networks_as_they_are(self, pipeline):
        model = copy.deepcopy(pipeline.model).train()
        LatteFlowPipeline(**pipeline.components | {"model": model})
        assert all(module.training for module in model.modules())
        if pipeline.vlm is None:
            with pytest.raises(ValueError, match="vlm: given; accepted: None, for a Blend model holds its own"):
                LatteFlowPipeline(**pipeline.components | {"vlm": model.vlm})

    def test_offloading_runs_each_component_where_it_computes(self, pipeline):
        """The hooks' order on a CPU, where nothing moves: each component is fetched and the one before it put away."""
        offloaded = copy.deepcopy(pipeline)
        offloaded.enable_model_cpu_offload(device="cpu")
        fetched = []
        for name, component in offloaded.components.items():
            if hook := getattr(component, "_hf_hook", None):
                fetch = hook.pre_forward
                hook.pre_forward = lambda *args, n=name, f=fetch, **kwargs: (fetched.append(n), f(*args, **kwargs))[1]
        offloaded._onload_backbone()
        assert_draw_the_same(pipeline, offloaded)
        first = ["model"] if pipeline.vlm is None else ["vlm"]
        assert list(dict.fromkeys(fetched)) == list(dict.fromkeys([*first, "model", "codec"]))
        assert offloaded.ask(picture("red"), QUESTION) == pipeline.ask(picture("red"), QUESTION)

    def test_offloading_without_an_accelerator_is_diffusers_error(self, pipeline, monkeypatch):
        monkeypatch.setattr(pipeline_utils, "get_device", lambda: "cpu")
        with pytest.raises(RuntimeError, match="requires accelerator, but not found"):
            copy.deepcopy(pipeline).enable_model_cpu_offload()

    def test_weights_of_another_network_are_refused(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        file = tmp_path / "model" / "model.safetensors"
        weights = load_file(file)
        name = "image_io.0.head.weight"
        for changed, message in (
            ({n: w for n, w in weights.items() if n != name}, f"1 missing: {name}"),
            (weights | {"surplus": weights[name].clone()}, "1 unknown: surplus"),
            (weights | {name: weights[name][:-1].clone()}, f"1 of another shape: {name}"),
        ):
            save_file(changed, file, {"format": "pt"})
            with pytest.raises(ValueError, match=f"weights: {message}; they are not of this network"):
                LatteFlowPipeline.from_pretrained(tmp_path)


class TestCall:
    """``pipeline(...)`` as diffusers' pipelines are called."""

    STEPS = MappingProxyType({"num_inference_steps": 4, "guidance_scale": 2.0})

    @pytest.fixture(autouse=True)
    def quiet(self, pipeline):
        pipeline.set_progress_bar_config(disable=True)

    def test_the_kinds_of_output_are_one_picture(self, pipeline):
        latents = pipeline("a red square", seed=4, output_type="latent", **self.STEPS).images
        assert latents.shape == (1, 3, 4, 4)
        pixels = pipeline("a red square", seed=4, output_type="pt", **self.STEPS).images
        torch.testing.assert_close(pixels, (pipeline.codec.decode(latents) / 2 + 0.5).clamp(0, 1))
        array = pipeline("a red square", seed=4, output_type="np", **self.STEPS).images
        assert torch.equal(torch.from_numpy(array), pixels.permute(0, 2, 3, 1))
        (image,) = pipeline("a red square", seed=4, **self.STEPS).images
        assert isinstance(image, Image.Image)
        assert image.size == (4, 4)
        assert (np.asarray(image) == (array[0] * 255).round()).all()

    def test_a_seed_draws_what_the_tools_draw(self, pipeline):
        images = pipeline(["a red square", ""], seed=11, num_images_per_prompt=2, output_type="np", **self.STEPS).images
        prompts = ["a red square", "a red square", "", ""]
        drawn = pipeline.generate(prompts, seed=11, num_steps=4, cfg_scale=2.0)
        assert abs(images * 255 - drawn).max() <= 0.5 + 1e-4

    def test_generators_and_latents_give_the_noise(self, pipeline):
        def draw(**noise):
            return pipeline(["a red square"] * 2, output_type="latent", **noise, **self.STEPS).images

        one = draw(generator=torch.Generator().manual_seed(3))
        assert torch.equal(one, draw(generator=torch.Generator().manual_seed(3)))
        noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
        assert torch.equal(one, draw(latents=noise))
        each = draw(generator=[torch.Generator().manual_seed(s) for s in (8, 9)])
        swapped = draw(generator=[torch.Generator().manual_seed(s) for s in (9, 8)])
        torch.testing.assert_close(each, swapped.flip(0))
        assert not torch.equal(each, one)
        torch.manual_seed(1)
        first, second = draw(), draw()
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        assert torch.equal(first, draw())

    def test_a_tuple_a_progress_bar_and_a_type(self, pipeline, capsys):
        (images,) = pipeline("", seed=0, return_dict=False, output_type="latent", **self.STEPS)
        pipeline = copy.deepcopy(pipeline)  # the type is changed
        pipeline.set_progress_bar_config(desc="drawing")
        bf16 = pipeline.to(torch.bfloat16)("", seed=0, output_type="latent", **self.STEPS).images
        assert pipeline.dtype == torch.bfloat16
        assert pipeline.to("cpu", torch.float32) is pipeline
        assert pipeline.device.type == "cpu"
        assert "drawing" in capsys.readouterr().err
        assert 0 < (bf16 - images).abs().max() < 0.5

    def test_a_type_leaves_the_positions_of_prompts_and_pictures_exact(self, pipeline):
        pipeline = copy.deepcopy(pipeline)

        def positions():
            """The frequencies of every network, and what the VLM's rotary embedding makes of positions 950 to 1000."""
            networks = [m for m in (pipeline.model, pipeline.vlm) if m is not None]
            buffers = [(n, b) for m in networks for n, b in m.named_buffers() if n.endswith(("inv_freq", "cos", "sin"))]
            rotary = pipeline.backbone.model.language_model.rotary_emb
            turned = rotary(torch.zeros(1), torch.arange(950, 1001).expand(3, 1, -1))
            return [(n, b.clone()) for n, b in buffers] + list(zip(("cos", "sin"), turned, strict=True))

        before, after = positions(), (pipeline.to(torch.bfloat16), positions())[1]
        assert len(before) > 5
        for (name, exact), (_, cast) in zip(before, after, strict=True):
            assert torch.equal(exact, cast), name

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"output_type": "jpeg"}, "output_type: 'jpeg' is unknown; accepted: pil, np, pt, latent"),
            ({"seed": 1, "generator": torch.Generator()}, "generator, seed: got 2 of them; accepted: one"),
            ({"latents": torch.zeros(1, 3, 2, 2)}, r"latents: got \[1, 3, 2, 2\]; accepted: \[1, 3, 4, 4\]"),
            ({"num_images_per_prompt": 0}, "num_images_per_prompt: nothing to draw"),
            ({"seed": -1}, "seed: got -1; accepted: 0 to"),
            ({"solver": "rk4"}, "solver: 'rk4' is unknown; accepted values: euler, heun"),
            ({"prompt": [True]}, "prompt: got True; accepted: a caption, or the index of a class"),
            ({"prompt": [0.5]}, "prompt: got 0.5; accepted: a caption, or the index of a class"),
            ({"prompt": np.int64(3)}, "classes: 3 is no class of this model; accepted: none, this model takes prompts"),
        ],
    )
    def test_wrong_arguments_are_named(self, pipeline, arguments, message):
        with pytest.raises(ValueError, match=message):
            pipeline(**{"prompt": "a red square"} | arguments)


def test_a_special_token_in_a_question_is_text(pipeline):
    """It stands for no picture: there would be more places than patches, which transformers refuses."""
    assert isinstance(pipeline.ask(picture("red"), "Is <|image_pad|> a word?", max_new_tokens=2), str)


def test_what_cannot_be_asked_is_named(pipeline):
    with pytest.raises(ValueError, match="question: got 5; accepted: a text"):
        pipeline.ask(picture("red"), 5)
    with pytest.raises(ValueError, match="image: got a str; accepted: a PIL image, or None"):
        pipeline.ask("red.png", QUESTION)


def test_only_a_saved_pipeline_is_written_over(pipeline, tmp_path):
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ValueError, match="holds something else than a saved pipeline; accepted: a new or empty folder"):
        pipeline.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["export.json"]
    pipeline.save_pretrained(tmp_path / "new")
    pipeline.save_pretrained(tmp_path / "new")


def test_a_folder_of_another_layout_is_named(pipeline, tmp_path):
    save_model_folder(pipeline, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json not found; .*load_pipeline opens runs"):
        LatteFlowPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"resolution": 4, "colour": "red"}'])
def test_a_damaged_description_is_named(pipeline, tmp_path, content):
    save_model_folder(pipeline, tmp_path)
    (tmp_path / "pipeline.json").write_text(content)
    with pytest.raises(UserError, match=r"pipeline\.json: damaged"):
        load_pipeline(tmp_path)


def test_a_folder_without_tokenizer_is_refused_without_asking_the_hub(pipeline, tmp_path):
    save_model_folder(pipeline, tmp_path)
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="tokenizer not found; accepted: a model folder"):
        load_pipeline(tmp_path)
