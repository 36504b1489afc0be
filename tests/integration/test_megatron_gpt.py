"""A VLM's language model in megatron-core's GPTModel: the same logits from the weights under Megatron's names."""

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from latte_flow.tools.conversion.megatron_gpt import gpt_arguments, gpt_part, write_megatron_gpt
from tests.integration import megatron_gpt_ranks
from tests.integration.megatron_gpt_ranks import assert_logits_agree
from tests.tiny import make_vlm, randomise, vlm_config


def untied_vlm() -> Qwen2VLForConditionalGeneration:
    """Return a VLM with a head of its own, and a vocabulary that two ranks cannot share equally."""
    config = vlm_config(2)
    config.tie_word_embeddings = False
    config.text_config.vocab_size += 1
    return randomise(Qwen2VLForConditionalGeneration(config).eval()).requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("family", "tied"), [("qwen2_vl", True), ("qwen2_vl", False), ("qwen3_vl", True)])
def test_the_logits_are_those_of_transformers(tmp_path, ranks, family, tied):
    vlm = make_vlm(4, family=family) if tied else untied_vlm()
    assert (vlm.lm_head.weight is vlm.model.language_model.embed_tokens.weight) == tied
    write_megatron_gpt(tmp_path / "gpt", vlm, step=7, tensor_parallel=ranks)
    ids = torch.randint(0, 60, (2, 11), generator=torch.Generator().manual_seed(3))
    assert_logits_agree(megatron_gpt_ranks.logits(tmp_path / "gpt", ids, tmp_path, ranks=ranks), vlm, ids)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_every_number_of_the_language_model_is_in_one_rank_or_the_same_in_all(family):
    vlm = make_vlm(2, family=family)
    parts = [gpt_part(vlm, rank, 2) for rank in range(2)]
    same = {name for name, tensor in parts[0].items() if tensor is not None and torch.equal(tensor, parts[1][name])}
    assert same == {name for name in parts[0] if "norm" in name}
    numbers = [
        tensor.flatten() for part in parts for name, tensor in part.items() if tensor is not None and name not in same
    ]
    numbers += [parts[0][name] for name in same]
    expected = torch.cat([parameter.flatten() for parameter in vlm.model.language_model.parameters()])
    assert torch.equal(torch.cat(numbers).sort().values, expected.sort().values)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act: 'gelu'; accepted with --to megatron-gpt: silu"),
        ("use_sliding_window", True, "use_sliding_window: True; accepted with --to megatron-gpt: False"),
        (
            "rope_parameters",
            {"rope_type": "yarn"},
            "rope_type: 'yarn'; accepted with --to megatron-gpt: default or mrope",
        ),
    ],
)
def test_a_language_model_that_a_gpt_does_not_compute_is_an_error(field, value, message):
    config = vlm_config(2)
    setattr(config.text_config, field, value)
    with pytest.raises(ValueError, match=message):
        gpt_arguments(config, 1)
