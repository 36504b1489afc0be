"""LatteFlowPipeline: questions are answered as transformers does it, and a folder holds all of it."""

import json

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from model.autoencoder import load_codec
from model.configuration import LatteFlowConfig
from model.latte_flow import LatteFlowModel
from model.pipeline import LatteFlowPipeline, PipelineConfig
from model.vlm import build_tiny_image_processor, build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module", params=["couple", "blend"])
def pipeline(request):
    tokenizer = build_tiny_tokenizer([QUESTION, "a red square"])
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    vlm = build_tiny_vlm(tiny_vlm_config(tokenizer, **sizes, intermediate_size=64, initializer_range=0.15), seed=0)
    config = LatteFlowConfig(
        vlm_config=vlm.config, latent_channels=3, latent_size=(4, 4), variant=request.param, num_groups=2
    )
    model = LatteFlowModel.from_vlm(vlm, config)
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
