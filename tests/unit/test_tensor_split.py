"""Tensor-parallel parts of parameters: which are split, and that parts make the whole again."""

import pytest
import torch

from latte_flow.model.tensor_split import (
    check_tensor_parallel,
    is_applied_to_heads,
    join_parts,
    partition_dim,
    take_part,
)
from tests.tiny import FAMILIES, make_model, make_vlm, vlm_config


@pytest.mark.parametrize("variant", ["couple", "blend"])
def test_heads_and_units_are_split_and_all_else_is_not(variant):
    """Counted from the shapes: 8 layers of 4 heads and 2 key heads of 16, an MLP of 96, and 4 gates of heads in 4 groups of 2."""
    model = make_model(make_vlm(), variant=variant, num_groups=4)
    split = {name for name, _ in model.named_parameters() if partition_dim(name) is not None}
    own = 8 * 3 + (8 * 7 if variant == "couple" else 0) + 4
    shared = 8 * 10 if variant == "blend" else 0
    assert len(split) == own + shared
    assert not any("visual" in name or "norm" in name or "modulation" in name for name in split)
    for name, parameter in model.named_parameters():
        parts = [take_part(name, parameter, rank, 2) for rank in range(2)]
        assert all(2 * part.numel() == parameter.numel() for part in parts) or partition_dim(name) is None
        assert torch.equal(join_parts(name, parts), parameter)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_vlm_is_split_by_the_same_rule(family):
    vlm = make_vlm(family=family)
    names = [name for name, _ in vlm.named_parameters()]
    blend = make_model(vlm, variant="blend")
    ours = {name for name, _ in blend.named_parameters() if partition_dim(name) is not None and name.startswith("vlm.")}
    assert {f"vlm.{name}" for name in names if partition_dim(name) is not None} == ours
    assert len(ours) == 8 * (7 if family == "qwen3_vl" else 10)


def test_norms_of_single_heads_are_replicated_and_applied_to_a_ranks_own():
    """Two a layer; none elsewhere, and none in a family without them."""
    vlm = make_vlm(family="qwen3_vl")
    for variant, number in (("couple", 8 * 2), ("blend", 8 * 2)):
        names = [name for name, _ in make_model(vlm, variant=variant).named_parameters() if is_applied_to_heads(name)]
        assert len(names) == number
        assert all(partition_dim(name) is None for name in names)
    assert sum(is_applied_to_heads(name) for name, _ in vlm.named_parameters()) == 8 * 2
    assert not any(is_applied_to_heads(name) for name, _ in make_model(make_vlm(), variant="blend").named_parameters())


def test_the_split_computes_the_same_projection():
    """x W^T by rows gives each rank's heads; by columns, the ranks' outputs add up."""
    x, rng = torch.randn(5, 8, dtype=torch.float64), torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((12, 8), (8, 12)))
    names = "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"
    total = sum(x @ take_part(names[0], up, rank, 2).T @ take_part(names[1], down, rank, 2).T for rank in range(2))
    torch.testing.assert_close(total, x @ up.T @ down.T)


def test_ranks_that_disagree_about_what_they_share_are_an_error():
    with pytest.raises(ValueError, match=r"layers\.0\.input_layernorm\.weight: differs between tensor-parallel ranks"):
        join_parts("layers.0.input_layernorm.weight", [torch.zeros(2), torch.ones(2)])


def test_ranks_that_disagree_by_rounding_are_joined_to_the_first():
    one = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert join_parts("image_io.0.patch_embed.weight", [one, one.bfloat16().float(), one]) is one
    with pytest.raises(ValueError, match=r"image_io\.0\.patch_embed\.weight: differs"):
        join_parts("image_io.0.patch_embed.weight", [one, torch.full_like(one, torch.nan)])


@pytest.mark.parametrize("size", [0, 3, 4])
def test_a_number_that_does_not_divide_the_heads_is_refused(size):
    message = f"tensor_parallel: {size} does not divide num_attention_heads 4, num_key_value_heads 2, .*accepted: 1, 2"
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(vlm_config().text_config, size)
    check_tensor_parallel(vlm_config().text_config, 2)
