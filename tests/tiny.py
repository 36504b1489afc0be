"""Tiny VLMs of every family built with transformers alone, prompts for them, and generation models over them.

Every weight is random, also those that start at zero or one: a bias or a norm that is used wrongly must show.
"""

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.latte_flow import LatteFlowModel

VOCABULARY = 64
VISION_START, VISION_END, IMAGE = 60, 61, 62

FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
HEAD_DIM = {"qwen2_vl": 16, "qwen2_5_vl": 16, "qwen3_vl": 24}
"""Size of the 4 query and 2 key heads; Qwen3-VL's need not fill the width of 64."""
_LATER_VISION = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
_VISION = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen2_5_vl": {**_LATER_VISION, "fullatt_block_indexes": [1]},
    "qwen3_vl": {**_LATER_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
}


def vlm_config(num_layers: int = 8, family: str = "qwen2_vl"):
    """Return a VLM's configuration of width 64: 4 query heads and 2 key heads, pictures in patches of 2 x 2 pixels."""
    # A small theta and one section per axis, all of them turning visibly within a few positions.
    rope = {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [2, 3, 3]}
    own = {}
    if family == "qwen3_vl":
        own, rope["mrope_section"] = {"head_dim": HEAD_DIM[family]}, [4, 4, 4]
    return FAMILIES[family][0](
        text_config={
            **own,
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            **_VISION[family],
            "depth": 2,
            "num_heads": 2,
            "patch_size": 2,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=63,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )


def randomise(module: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
    """Add N(0, std^2) to every parameter."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=rng))
    return module


def make_vlm(num_layers: int = 8, seed: int = 0, family: str = "qwen2_vl"):
    """Return a random VLM in eval mode, its weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = FAMILIES[family][1](vlm_config(num_layers, family))
    return randomise(vlm.eval(), seed=seed).requires_grad_(False)


def make_config(vlm, **changes) -> LatteFlowConfig:
    """Return the configuration of a generation model over a VLM: a 4 x 4 latent of 3 channels unless changed."""
    fields = {"latent_channels": 3, "latent_size": (4, 4), "timestep_frequencies": 32}
    return LatteFlowConfig(vlm_config=vlm.config, **(fields | changes))


def make_model(vlm, *, random: bool = True, seed: int = 0, **changes) -> LatteFlowModel:
    """Return a generation model in eval mode, as new (``random=False``) or with noise on every weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatteFlowModel.from_vlm(vlm, make_config(vlm, **changes)).eval()
    return randomise(model, seed=seed + 1) if random else model


def text_prompts(lengths: tuple[int, ...] = (7, 3, 5)) -> dict[str, Tensor]:
    """Return prompts of random words of the given lengths, padded on the right."""
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VISION_START, (len(lengths), max(lengths)), generator=rng)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def image_prompts() -> dict[str, Tensor]:
    """Return two prompts with a picture between words, as Qwen2-VL's processor would: 2 x 3 and 3 x 1 tokens of picture."""
    rng = torch.Generator().manual_seed(6)
    grids = torch.tensor([[1, 4, 6], [1, 6, 2]])
    rows = [
        [5, 9, VISION_START, *[IMAGE] * 6, VISION_END, 7, 11, 13],
        [8, VISION_START, *[IMAGE] * 3, VISION_END, 17, 4],
    ]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    patches = int(grids.prod(1).sum())
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(patches, 3 * 2 * 2 * 2, generator=rng),
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


PROMPTS = {"text": text_prompts, "pictures": image_prompts}


def noise(batch: int, *shape: int, seed: int = 7) -> Tensor:
    """Return N(0, 1) numbers [batch, *shape]; a latent of ``make_config`` unless a shape is given."""
    return torch.randn(batch, *(shape or (3, 4, 4)), generator=torch.Generator().manual_seed(seed))
