"""LatteFlowPipeline: questions are answered as transformers does it, and a folder holds all of it."""

import copy
import json
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from latte_flow.model.backbone import build_tiny_image_processor, build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from latte_flow.model.codecs import load_codec
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.pipeline import LatteFlowPipeline, PipelineConfig
from tests.tiny import randomise

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module", params=["couple", "blend"])
def pipeline(request):
    tokenizer = build_tiny_tokenizer([QUESTION, "a red square"])
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    vlm = build_tiny_vlm(tiny_vlm_config(tokenizer, **sizes, intermediate_size=64, initializer_range=0.15), seed=0)
    config = LatteFlowConfig(
        vlm_config=vlm.config, latent_channels=3, latent_size=(4, 4), variant=request.param, num_groups=2
    )
    model = randomise(LatteFlowModel.from_vlm(vlm, config), std=0.05)  # a new one predicts zero
    codec = {"kind": "pixel", "image_channels": 3, "patch": 1}
    names = PipelineConfig(resolution=4, image_channels=3, prompt_template="{}", null_prompt="", codec=codec)
    vlm = model.vlm if request.param == "blend" else vlm
    processor = build_tiny_image_processor(vlm.config)
    return LatteFlowPipeline(model, vlm, tokenizer, load_codec(**codec), names, processor)


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (60, 84), colour)


def test_an_answer_is_what_transformers_generates_from_a_prompt_written_out_here(pipeline, tmp_path):
    pipeline.vlm.save_pretrained(tmp_path)
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


def test_a_saved_pipeline_answers_and_draws_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = LatteFlowPipeline.from_pretrained(tmp_path)
    assert loaded.ask(picture("red"), QUESTION) == pipeline.ask(picture("red"), QUESTION)
    drawn = [p.generate(["a red square"], num_steps=4, cfg_scale=2.0) for p in (pipeline, loaded)]
    assert torch.equal(*map(torch.from_numpy, drawn))


def test_a_model_trained_with_flash_loads_where_there_is_none(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_backend": "flash"}))
    loaded = LatteFlowPipeline.from_pretrained(tmp_path)
    drawn = [p.generate(["a red square"], num_steps=4, cfg_scale=2.0) for p in (pipeline, loaded)]
    assert torch.equal(*map(torch.from_numpy, drawn))


def test_a_picture_without_an_image_processor_is_an_error(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "tokenizer" / "preprocessor_config.json").unlink()
    loaded = LatteFlowPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"image: .*preprocessor_config\.json"):
        loaded.ask(picture("red"), QUESTION)
    assert loaded.ask(None, QUESTION) == pipeline.ask(None, QUESTION)


class TestCall:
    """``pipeline(...)`` as diffusers' pipelines are called."""

    STEPS = MappingProxyType({"num_inference_steps": 3, "guidance_scale": 2.0})

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
        drawn = pipeline.generate(prompts, seed=11, num_steps=3, cfg_scale=2.0)
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


def test_what_cannot_be_asked_is_named(pipeline):
    with pytest.raises(ValueError, match=r"question: got 'Is <\|image_pad\|> a word\?'; accepted: a text without"):
        pipeline.ask(picture("red"), "Is <|image_pad|> a word?")
    with pytest.raises(ValueError, match="image: got a str; accepted: a PIL image, or None"):
        pipeline.ask("red.png", QUESTION)


def test_what_a_conversion_has_written_is_not_written_over(pipeline, tmp_path):
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an export \(export.json\); accepted: another folder"):
        pipeline.save_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"resolution": 4, "colour": "red"}'])
def test_a_damaged_description_is_named(pipeline, tmp_path, content):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "pipeline.json").write_text(content)
    with pytest.raises(ValueError, match=r"pipeline\.json: damaged"):
        LatteFlowPipeline.from_pretrained(tmp_path)


def test_a_folder_without_tokenizer_is_refused_without_asking_the_hub(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="tokenizer not found; accepted: an exported model folder"):
        LatteFlowPipeline.from_pretrained(tmp_path)
