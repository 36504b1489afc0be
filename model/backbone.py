"""The vision-language model: loaded with transformers, or a tiny one built from a configuration for tests and the digits preset.

The tiny VLM is a real Qwen2VLForConditionalGeneration with a tokenizer of its own, so the whole framework runs with no download.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
)
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from latte_flow.model.files import ACCEPTED, cached_snapshot, check_config, locate

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2-VL's special tokens, by the same names, at the start of the tiny vocabulary."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat format of Qwen2-VL without its default system message, for the tiny tokenizer."""


def build_tiny_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a few sentences. Every byte has a token, so any text can be written with it.

    Args:
        texts: the sentences whose words become single tokens, most frequent first.
        vocab_size: upper bound of the vocabulary: special tokens, 256 bytes, merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "user\nassistant\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def tiny_vlm_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    intermediate_size: int,
    initializer_range: float,
) -> Qwen2VLConfig:
    """Return the configuration of a tiny Qwen2-VL for a tokenizer; its vision tower has two layers of width 32."""
    half_head = hidden_size // num_attention_heads // 2
    ids = {name: cast(int, tokenizer.convert_tokens_to_ids(name)) for name in SPECIAL_TOKENS}
    # Qwen2-VL gives 1/4, 3/8, 3/8 of the rotary frequencies to time, row and column.
    sections = [half_head // 4, (half_head - half_head // 4 + 1) // 2, (half_head - half_head // 4) // 2]
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "intermediate_size": intermediate_size,
            "initializer_range": initializer_range,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": hidden_size, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_tiny_vlm(config: Qwen2VLConfig, seed: int) -> Qwen2VL:
    """Build a Qwen2-VL with random weights that depend on the seed alone; the global generator is left as it was.

    A frozen random VLM must carry the prompt to the generation path: with the usual initializer_range of 0.02 its states hardly
    differ between classes, with 0.15 they do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2VL(config).eval()


def read_vlm_config(path: str | Path) -> PretrainedConfig:
    """Read the configuration of a VLM from a folder or a hub id.

    Raises:
        ValueError: when the path is neither, a folder without config.json, holds another kind of model, or see
            ``model.files.locate`` and ``check_config``.
    """
    path = locate(path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"path: {path} has no config.json; accepted: {ACCEPTED}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_config(config)
    except (OSError, ValueError) as error:  # ValueError: a model_type that transformers does not know
        raise ValueError(f"path: cannot load {path}: {error}") from error
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"path: {path} holds a {config.model_type}; accepted: {', '.join(MODEL_TYPES)}")
    return config


def load_vlm(
    path: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer_path: str | Path | None = None,
    expected_fingerprint: str | None = None,
):
    """Load a VLM and its tokenizer from a folder or a hub id through transformers.

    Args:
        path: folder or hub id.
        dtype: the type of the weights; None for the checkpoint's.
        tokenizer_path: where the tokenizer is, when not beside the weights.
        expected_fingerprint: what ``fingerprint`` must return of the folder; None accepts any.

    Returns:
        (vlm in eval mode, tokenizer).

    Raises:
        ValueError: when ``read_vlm_config`` refuses the path, or it is another VLM than expected.
    """
    read_vlm_config(path)  # refuses what is no VLM, before any weights are read
    try:
        vlm = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype or "auto", trust_remote_code=False)
        tokenizer = load_tokenizer(tokenizer_path or path)
    except OSError as error:
        raise ValueError(f"path: cannot load {path}: {error}") from error
    if expected_fingerprint and fingerprint(checkpoint_folder(path)) != expected_fingerprint:
        raise ValueError(f"path: {path} is not the VLM that this model was trained with (fingerprint differs)")
    return vlm.eval(), tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or hub id.

    Raises:
        ValueError: if it comes with code of its own, which is never executed. Without an explicit answer transformers asks at the
            terminal.
    """
    return AutoTokenizer.from_pretrained(locate(path), trust_remote_code=False)


def load_image_processor(path: str | Path):
    """Load what turns pictures into the VLM's input, from the VLM's folder or hub id; None for a folder that holds none."""
    path = locate(path)
    if Path(path).is_dir() and not (Path(path) / "preprocessor_config.json").is_file():
        return None
    return AutoImageProcessor.from_pretrained(path, trust_remote_code=False)


def build_tiny_image_processor(config: Qwen2VLConfig) -> Qwen2VLImageProcessorPil:
    """Return Qwen2-VL's image processor for a tiny VLM: pictures of up to 112 x 112 pixels, 16 tokens."""
    vision = cast(Qwen2VLVisionConfig, config.vision_config)
    patch_size, temporal_patch_size = cast(int, vision.patch_size), cast(int, vision.temporal_patch_size)
    return Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=(2 * patch_size) ** 2,
        max_pixels=(8 * patch_size) ** 2,
    )


def checkpoint_folder(path: str | Path) -> Path:
    """Return the folder of a loaded checkpoint: the path itself, or where the hub's files lie in the local cache.

    Raises:
        ValueError: when a hub id is not in the local cache.
    """
    folder = Path(path) if Path(path).is_dir() else cached_snapshot(str(path))
    if folder is None:
        raise ValueError(f"path: {path} is not in the hub's local cache")
    return folder


def fingerprint(folder: str | Path) -> str:
    """Return the SHA-256 over the names and contents of a saved model's config.json and weight files.

    Raises:
        FileNotFoundError: when the folder holds no weights.
    """
    folder = Path(folder)
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not weights:
        raise FileNotFoundError(f"{folder}: no *.safetensors or *.bin weights to take a fingerprint of")
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weights]:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
