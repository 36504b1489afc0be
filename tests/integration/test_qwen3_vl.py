"""A tiny random Qwen3-VL by its path: trained, resumed, split over tensor-parallel ranks and exported, as Qwen2-VL is."""

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from latte_flow.model.tiny_vlm import build_tiny_tokenizer, tiny_vlm_config
from latte_flow.tools.conversion.convert import convert
from latte_flow.training.checkpoint.opening import load_pipeline
from latte_flow.training.errors import UserError
from tests.integration.launching import column
from tests.integration.test_training import assert_losses_and_norms_agree, assert_weights_equal

FIELDS = {"sample__every": 0, "max_steps": 4, "checkpoint__every": 2, "model__variant": "blend"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Heads of 12 in a width of 32, and DeepStack; what transformers saves of a VLM, its tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("vlm") / "Qwen3-VL-tiny"
    tokenizer = build_tiny_tokenizer([f"Generate an image of the digit {n}." for n in ("zero", "one", "two")], 400)
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = tiny_vlm_config(tokenizer, **sizes, intermediate_size=64, initializer_range=0.15).to_dict()
    text = {
        name: value for name, value in settings["text_config"].items() if name in Qwen3VLConfig().text_config.to_dict()
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    text |= {"model_type": "qwen3_vl_text", "head_dim": 12, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    tokens = {name: value for name, value in settings.items() if name.endswith("token_id")}
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=16, min_pixels=32**2, max_pixels=128**2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blend(command, folder):
    return command.train(vlm__path=folder, **FIELDS)


def test_a_stopped_run_goes_on_to_the_bit(command, folder, blend):
    half = command.train(vlm__path=folder, **FIELDS | {"max_steps": 2})
    run = command.train(vlm__path=folder, **FIELDS, output_dir=half.output_dir)
    assert f"resumed from {half.checkpoint(2)}" in run.finished.output
    assert column(run.output_dir, "loss") == column(blend.output_dir, "loss")
    assert_weights_equal(run, blend, 4)


def test_two_tensor_parallel_ranks_train_what_one_rank_trains(command, folder, blend):
    run = command.train(vlm__path=folder, ranks=2, tensor_parallel=2, **FIELDS)
    assert_losses_and_norms_agree(run, blend, rel=1e-4)


def assert_stock_folder_answers_as(pipeline, folder) -> None:
    stock = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    config, vision = stock.config, stock.config.vision_config
    ids = torch.tensor([[55, config.vision_start_token_id, *[config.image_token_id] * 4, 59, 61]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, 3 * vision.temporal_patch_size * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, pipeline.backbone(**inputs).logits)


def test_the_trained_vlm_becomes_a_stock_one(blend, folder, tmp_path):
    pipeline = load_pipeline(blend.output_dir)
    assert_stock_folder_answers_as(
        pipeline, convert(str(blend.output_dir), str(tmp_path / "out"), to="qwen3-vl", verify=True)
    )
    weight = "model.language_model.layers.0.self_attn.q_norm.weight"  # shared with the generation layer, and trained
    before = Qwen3VLForConditionalGeneration.from_pretrained(folder).get_parameter(weight)
    assert not torch.equal(pipeline.backbone.get_parameter(weight), before)
    with pytest.raises(UserError, match=r"^to: qwen2-vl; the VLM is a qwen3_vl; accepted: qwen3-vl"):
        convert(str(blend.output_dir), str(tmp_path / "other"), to="qwen2-vl")


def test_beside_a_frozen_one_a_couple_trains_draws_and_answers(command, folder, tmp_path):
    run = command.train(vlm__path=folder, **FIELDS | {"model__variant": "couple", "max_steps": 2})
    pipeline = load_pipeline(run.output_dir)
    assert pipeline([3], num_inference_steps=4, seed=0, output_type="latent").images.isfinite().all()
    answers = {pipeline.ask(Image.new("RGB", (64, 64), colour), "zero or one?") for colour in ("red", "blue")}
    assert len(answers) == 2
    assert_stock_folder_answers_as(pipeline, convert(str(run.output_dir), str(tmp_path / "out"), to="qwen3-vl"))
