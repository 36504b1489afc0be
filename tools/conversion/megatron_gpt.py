"""The understanding path's language model as megatron-core's GPTModel: its weight names, in one file per tensor-parallel rank.

The vision tower has no counterpart in a GPTModel and is not written. Text tokens have equal positions in time, row and column, so
the multimodal rotary embedding reduces to the standard one, which Megatron applies to a head's halves, like transformers.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from latte_flow.model.backbone import backbone_of
from latte_flow.model.tensor_split import take_part
from latte_flow.tools.conversion.writers import write_megatron_rank
from latte_flow.training.checkpoint.formats.source import load_torch_file
from latte_flow.training.checkpoint.formats.torch_files import RANK_FILE, find_iteration

GPT_FILE = "gpt_model.json"
"""The arguments of TransformerConfig and GPTModel."""
LANGUAGE_MODEL = "model.language_model"
HEAD = "lm_head.weight"


def write_megatron_gpt(folder: Path, vlm: PreTrainedModel, *, step: int | None, tensor_parallel: int) -> None:
    """Write a VLM's language model for a GPTModel with the local layer specification, and the arguments to build it.

    Args:
        folder: output folder.
        vlm: the VLM.
        step: training step of its weights; None if unknown.
        tensor_parallel: number of ranks.

    Raises:
        ValueError: when a GPTModel cannot represent this language model.
    """
    arguments = gpt_arguments(vlm.config, tensor_parallel)
    for rank in range(tensor_parallel):
        write_megatron_rank(folder, gpt_part(vlm, rank, tensor_parallel), rank, tensor_parallel, step)
    (folder / GPT_FILE).write_text(json.dumps(arguments, indent=1))


def compare_megatron_gpt(
    folder: Path, vlm: PreTrainedModel, *, tensor_parallel: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, tensor in the folder, expected tensor) for every weight that ``write_megatron_gpt`` wrote."""
    for rank in range(tensor_parallel):
        written = load_torch_file(find_iteration(folder) / f"mp_rank_{rank:02d}" / RANK_FILE)["model"]
        for name, expected in gpt_part(vlm, rank, tensor_parallel).items():
            if expected is not None:
                yield f"{name} of rank {rank}", written[name], expected


def gpt_arguments(config: PretrainedConfig, tensor_parallel: int) -> dict[str, dict]:
    """Return the arguments of TransformerConfig and GPTModel for a VLM's language model, as JSON-serialisable values.

    Raises:
        ValueError: when a GPTModel cannot represent this language model.
    """
    text, backbone = config.text_config, backbone_of(config)
    rope = text.rope_parameters
    # transformers calls the multimodal rotary embedding "default" or "mrope"; the other types rescale it.
    for name, value, accepted in (
        ("hidden_act", text.hidden_act, ("silu",)),
        ("rope_type", rope["rope_type"], ("default", "mrope")),
        ("use_sliding_window", getattr(text, "use_sliding_window", False), (False,)),
        ("attention_bias", getattr(text, "attention_bias", False), (False,)),
    ):
        if value not in accepted:
            raise ValueError(f"{name}: {value!r}; accepted with --to megatron-gpt: {' or '.join(map(str, accepted))}")
    with torch.device("meta"):
        layer = backbone.decoder_layer(text, 0)
    return {
        "transformer_config": {
            "num_layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "num_attention_heads": text.num_attention_heads,
            "num_query_groups": text.num_key_value_heads,
            "kv_channels": backbone.head_dim(text),
            "ffn_hidden_size": text.intermediate_size,
            "normalization": "RMSNorm",
            "layernorm_epsilon": text.rms_norm_eps,
            "activation_func": text.hidden_act,
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": layer.get_submodule(backbone.path("q_proj")).bias is not None,
            "qk_layernorm": "q_norm" in backbone.submodules,
            "hidden_dropout": 0.0,
            "attention_dropout": text.attention_dropout,
            "tensor_model_parallel_size": tensor_parallel,
        },
        "gpt_model": {
            "vocab_size": text.vocab_size + -text.vocab_size % tensor_parallel,
            "max_sequence_length": text.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": rope["rope_theta"],
            "share_embeddings_and_output_weights": config.tie_word_embeddings,
        },
    }


def gpt_part(vlm: PreTrainedModel, rank: int, size: int) -> dict[str, Tensor | None]:
    """Return the GPTModel state dict of one of ``size`` tensor-parallel ranks.

    Megatron fuses projections: linear_qkv has, for each key head, its query heads, the key head and the value head; linear_fc1
    has a rank's gate projection, then its up projection. The vocabulary is split over the ranks and padded with zero rows.
    """
    text, weights = vlm.config.text_config, vlm.state_dict()
    groups = text.num_key_value_heads // size

    def part(name: str) -> Tensor:
        return take_part(name, weights[name], rank, size)

    def vocabulary(name: str) -> Tensor:
        padded = F.pad(weights[name], (0, 0, 0, -text.vocab_size % size))
        return padded.chunk(size)[rank].clone()

    state = {"embedding.word_embeddings.weight": vocabulary(f"{LANGUAGE_MODEL}.embed_tokens.weight")}
    for index in range(text.num_hidden_layers):
        ours, theirs = f"{LANGUAGE_MODEL}.layers.{index}", f"decoder.layers.{index}"
        for kind in ("weight", "bias"):
            if f"{ours}.self_attn.q_proj.{kind}" not in weights:
                continue
            heads = [part(f"{ours}.self_attn.{x}_proj.{kind}").unflatten(0, (groups, -1)) for x in "qkv"]
            state[f"{theirs}.self_attention.linear_qkv.{kind}"] = torch.cat(heads, dim=1).flatten(0, 1)
        units = [part(f"{ours}.mlp.{x}_proj.weight") for x in ("gate", "up")]
        state[f"{theirs}.mlp.linear_fc1.weight"] = torch.cat(units)
        for name, other in {
            "self_attention.linear_proj": "self_attn.o_proj",
            "self_attention.q_layernorm": "self_attn.q_norm",
            "self_attention.k_layernorm": "self_attn.k_norm",
            "mlp.linear_fc2": "mlp.down_proj",
            "input_layernorm": "input_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
        }.items():
            if f"{ours}.{other}.weight" in weights:
                state[f"{theirs}.{name}.weight"] = part(f"{ours}.{other}.weight").clone()
        for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
            state[f"{theirs}.{name}._extra_state"] = None  # strict loading of Megatron's linears requires the key
    state["decoder.final_layernorm.weight"] = weights[f"{LANGUAGE_MODEL}.norm.weight"].clone()
    if not vlm.config.tie_word_embeddings:
        state["output_layer.weight"] = vocabulary(HEAD)
    return state | {"output_layer._extra_state": None}
