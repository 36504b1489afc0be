"""Loading a VLM: from a folder, from the hub's cache, Qwen2-VL and Qwen2.5-VL; an unknown family is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from latte_flow.model.backbone import fingerprint, load_image_processor, load_tokenizer, load_vlm, read_vlm_config
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.context import encode_context, tokenize_prompts
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.tiny_vlm import build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from tests.tiny import noise

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = ["A red apple.", "Seven geese"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer(TEXTS, vocab_size=300)


def tiny_config(tokenizer):
    return tiny_vlm_config(tokenizer, **SIZES, intermediate_size=64, initializer_range=0.15)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    build_tiny_vlm(tiny_config(tokenizer), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_hub_id_is_loaded_and_has_the_fingerprint_of_its_files(folder, tokenizer, tmp_path):
    """The hub's own cache on disk, without a network: what a compute node sees after a download on the login node."""
    repository = tmp_path / "models--latte--tiny-vlm"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    program = (
        "from latte_flow.model.backbone import checkpoint_folder, fingerprint, load_vlm\n"
        "vlm, tokenizer = load_vlm('latte/tiny-vlm')\n"
        "print(type(vlm).__name__, len(tokenizer), fingerprint(checkpoint_folder('latte/tiny-vlm')))\n"
    )
    settings = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, env=settings, capture_output=True, text=True)
    assert ended.stdout.split() == ["Qwen2VLForConditionalGeneration", str(len(tokenizer)), fingerprint(folder)], (
        ended.stderr
    )


def test_the_fingerprint_changes_with_a_weight_and_with_the_configuration(folder, tmp_path):
    same = shutil.copytree(folder, tmp_path / "same")
    assert fingerprint(same) == fingerprint(folder)
    for name in ("model.safetensors", "config.json"):
        other = shutil.copytree(folder, tmp_path / name)
        content = bytearray((other / name).read_bytes())
        content[-2] ^= 1
        (other / name).write_bytes(content)
        assert fingerprint(other) != fingerprint(folder)


def test_other_models_and_missing_ones_are_refused(folder, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"^path: .*has no config\.json"):
        load_vlm(tmp_path)
    llama = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    LlamaForCausalLM(llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^path: .* holds a llama; accepted: qwen2_vl, qwen2_5_vl, qwen3_vl$"):
        load_vlm(tmp_path)


@pytest.mark.parametrize("kind", [LlavaConfig, Gemma3Config])
def test_a_network_over_an_unknown_family_names_the_accepted_ones(kind):
    message = (
        f"^vlm_config.model_type: '{kind.model_type}' is unknown; accepted values: qwen2_vl, qwen2_5_vl, qwen3_vl$"
    )
    with pytest.raises(ValueError, match=message):
        LatteFlowConfig(vlm_config=kind())


@pytest.fixture(scope="module")
def qwen2_5_folder(tokenizer, tmp_path_factory):
    folder, settings = tmp_path_factory.mktemp("qwen2_5_vl"), tiny_config(tokenizer).to_dict()
    text = {k: v for k, v in settings["text_config"].items() if k != "model_type"}
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
    vision |= {"fullatt_block_indexes": [1]}
    tokens = {k: v for k, v in settings.items() if k.endswith("token_id")}
    torch.manual_seed(0)
    vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    vlm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestQwen2_5:
    """Its decoder layer is Qwen2-VL's."""

    def test_the_context_is_what_its_layers_read(self, qwen2_5_folder):
        vlm, tokenizer = load_vlm(qwen2_5_folder)
        assert type(vlm) is Qwen2_5_VLForConditionalGeneration
        inputs, seen = tokenize_prompts(tokenizer, TEXTS), []
        context = encode_context(vlm, inputs, "generation")
        layers = vlm.model.language_model.layers
        hooks = [layer.input_layernorm.register_forward_hook(lambda *a: seen.append(a[2])) for layer in layers]
        vlm(**inputs)
        for hook in hooks:
            hook.remove()
        for layer, expected in enumerate(seen):
            torch.testing.assert_close(
                context.states[layer][context.mask], expected[context.mask], rtol=1e-4, atol=1e-5
            )

    @pytest.mark.parametrize("variant", ["couple", "blend"])
    def test_generation_layers_are_copies_of_its_layers_and_train(self, qwen2_5_folder, tmp_path, variant):
        vlm, tokenizer = load_vlm(qwen2_5_folder)
        config = LatteFlowConfig(
            vlm_config=vlm.config, latent_channels=3, latent_size=(4, 4), num_groups=2, variant=variant
        )
        model = LatteFlowModel.from_vlm(vlm, config)
        theirs = vlm.model.language_model.layers[2].mlp.down_proj.weight
        assert any(torch.equal(theirs, parameter) for parameter in model.parameters())
        inputs = tokenize_prompts(tokenizer, TEXTS)
        given = (
            {"prompt_inputs": inputs} if variant == "blend" else {"context": encode_context(vlm, inputs, "generation")}
        )
        arguments = (noise(4, 3, 4, 4), torch.tensor([900.0, 800.0, 200.0, 100.0]))
        velocity = model(*arguments, context_rows=torch.tensor([0, 1, 1, 0]), **given)
        velocity.square().mean().backward()
        model.save_pretrained(tmp_path)
        again = LatteFlowModel.from_pretrained(tmp_path)
        assert torch.equal(again(*arguments, context_rows=torch.tensor([0, 1, 1, 0]), **given), velocity)


CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLImageProcessorPil
Path(__file__).with_name("executed").touch()
class Tokenizer(PreTrainedTokenizerFast): pass
class Config(Qwen2VLConfig): model_type = "other"
class Processor(Qwen2VLImageProcessorPil): pass
"""
FOREIGN = {
    "tokenizer_config.json": (
        {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}},
        load_tokenizer,
    ),
    "config.json": ({"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}, read_vlm_config),
    "preprocessor_config.json": (
        {"image_processor_type": "Processor", "auto_map": {"AutoImageProcessor": "code.Processor"}},
        load_image_processor,
    ),
}


@pytest.mark.parametrize("file", FOREIGN)
def test_code_in_a_folder_is_neither_executed_nor_asked_about(tmp_path, monkeypatch, file):
    content, load = FOREIGN[file]
    (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "code.py").write_text(CODE)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        load(tmp_path)
    assert not list(tmp_path.rglob("executed"))
