"""The families of vision-language models, and how one is loaded with transformers.

``BACKBONES`` holds all that the package knows of a family; code outside the package may add others. Shapes, biases and norms
are not listed: a generation layer is made of the submodules of transformers' own decoder layer.

Shapes: B batch, S tokens, E head_dim.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

from latte_flow.model.errors import ArgumentError
from latte_flow.model.files import ACCEPTED, cached_snapshot, check_config, check_sizes, loading, locate
from latte_flow.model.tables import enter, look_up

SUBMODULES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp": "mlp",
}
"""Name of a generation layer's submodule -> its path in a VLM layer without norms of queries and keys."""
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
"""RMS norms of each query and key head before its rotation; where a family has them, a layer's ``submodules`` name them."""


@dataclass(frozen=True)
class Backbone:
    """A family of VLMs, which transformers' AutoModelForImageTextToText builds.

    Its decoder layers are pre-norm, with a gated MLP and rotations of a head's halves, (i, i + E/2) together, over the whole
    head; its vlm.model takes ``input_ids``, a 4D ``attention_mask``, ``position_ids`` [3, B, S] and ``use_cache``, and has
    ``get_rope_index`` for prompts with pictures.

    Attributes:
        decoder_layer: builds a layer of the language model from (text_config, layer index).
        rotary: builds its rotary embedding from text_config: (x, position_ids [3, B, S]) -> (cos, sin), each [B, S, E].
        export_format: name of its stock checkpoint folder in tools/convert_checkpoint.py.
        submodules: name of a generation layer's submodule -> path in a decoder layer.
        layers: path of the decoder layers in a VLM.
        embeddings: path of the token embedding.
        unread: paths of what no layer's context depends on: behind the last layer, or in front of pictures, which prompts have
            none of.
        split_by_rows: linears, named from a generation layer, whose outputs tensor-parallel ranks share out: heads, MLP units.
        split_by_columns: linears whose inputs they share out.
    """

    decoder_layer: Callable[[Any, int], nn.Module]
    rotary: Callable[[Any], nn.Module]
    export_format: str
    submodules: Mapping[str, str] = field(default_factory=SUBMODULES.copy)
    layers: str = "model.language_model.layers"
    embeddings: str = "model.language_model.embed_tokens"
    unread: tuple[str, ...] = ("model.visual", "model.language_model.norm", "lm_head")
    split_by_rows: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "mlp.gate_proj", "mlp.up_proj")
    split_by_columns: tuple[str, ...] = ("o_proj", "mlp.down_proj")

    def head_dim(self, text_config) -> int:
        """Return E, the size of a head; heads x E need not be the hidden size."""
        return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads

    def attention_scale(self, text_config) -> float:
        """Return what the products of queries and keys are multiplied by."""
        return self.head_dim(text_config) ** -0.5

    def decoder_layers(self, vlm: nn.Module) -> nn.ModuleList:
        """Return the decoder layers of a VLM."""
        return cast(nn.ModuleList, vlm.get_submodule(self.layers))

    def path(self, name: str) -> str:
        """Return the path in a decoder layer of a part named from a generation layer, such as ``mlp.up_proj``."""
        submodule, _, part = name.partition(".")
        return ".".join(filter(None, (self.submodules[submodule], part)))


BACKBONES: dict[str, Backbone] = {
    "qwen2_vl": Backbone(qwen2_vl.Qwen2VLDecoderLayer, qwen2_vl.Qwen2VLRotaryEmbedding, "qwen2-vl"),
    "qwen2_5_vl": Backbone(qwen2_5_vl.Qwen2_5_VLDecoderLayer, qwen2_5_vl.Qwen2_5_VLRotaryEmbedding, "qwen2-vl"),
    "qwen3_vl": Backbone(
        qwen3_vl.Qwen3VLTextDecoderLayer,
        qwen3_vl.Qwen3VLTextRotaryEmbedding,
        "qwen3-vl",
        submodules=SUBMODULES | HEAD_NORMS,
    ),
}
"""``model_type`` of a VLM's configuration -> its family."""


def register_backbone(model_type: str, backbone: Backbone) -> Backbone:
    """Add a family to ``BACKBONES``.

    Raises:
        ArgumentError: when the model type is taken.
    """
    return enter(BACKBONES, model_type, backbone)


def backbone_of(vlm_config: PretrainedConfig) -> Backbone:
    """Return the family of a VLM's configuration.

    Raises:
        ArgumentError: when it is not in ``BACKBONES``.
    """
    return look_up(BACKBONES, vlm_config.model_type, "vlm_config.model_type")


def read_vlm_config(path: str | Path) -> PretrainedConfig:
    """Read the configuration of a VLM from a folder or a hub id.

    Raises:
        ArgumentError: when the path is neither, a folder without config.json, holds another kind of model, or see
            ``model.files.locate`` and ``check_config``.
    """
    path = locate(path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ArgumentError(f"path: {path} has no config.json; accepted: {ACCEPTED}")
    with loading(path):
        check_sizes(PretrainedConfig.get_config_dict(path)[0])
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_config(config)
    if config.model_type not in BACKBONES:
        raise ArgumentError(f"path: {path} holds a {config.model_type}; accepted: {', '.join(BACKBONES)}")
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
        ArgumentError: when ``read_vlm_config`` refuses the path, or it is another VLM than expected.
    """
    read_vlm_config(path)  # refuses what is no VLM, before any weights are read
    with loading(path):
        vlm = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype or "auto", trust_remote_code=False)
    tokenizer = load_tokenizer(tokenizer_path or path)
    if expected_fingerprint and fingerprint(checkpoint_folder(path)) != expected_fingerprint:
        raise ArgumentError(f"path: {path} is not the VLM that this model was trained with (fingerprint differs)")
    return vlm.eval(), tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or hub id.

    Raises:
        ArgumentError: if it comes with code of its own, which is never executed. Without an explicit answer transformers asks at
            the terminal.
    """
    path = locate(path)
    with loading(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_image_processor(path: str | Path):
    """Load what turns pictures into the VLM's input, from the VLM's folder or hub id; None for a folder that holds none."""
    path = locate(path)
    if Path(path).is_dir() and not (Path(path) / "preprocessor_config.json").is_file():
        return None
    with loading(path):
        return AutoImageProcessor.from_pretrained(path, trust_remote_code=False)


def checkpoint_folder(path: str | Path) -> Path:
    """Return the folder of a loaded checkpoint: the path itself, or where the hub's files lie in the local cache.

    Raises:
        ArgumentError: when a hub id is not in the local cache.
    """
    folder = Path(path) if Path(path).is_dir() else cached_snapshot(str(path))
    if folder is None:
        raise ArgumentError(f"path: {path} is not in the hub's local cache")
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
