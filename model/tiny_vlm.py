"""A tiny VLM with random weights, for tests and the digits preset.

It is a real Qwen2VLForConditionalGeneration with a tokenizer of its own, so the whole framework runs with no download.
"""

import itertools
from collections.abc import Iterable
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLImageProcessorPil
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

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
    tokenizer.train_from_iterator(itertools.chain(texts, ["user\nassistant\n"]), trainer)
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
