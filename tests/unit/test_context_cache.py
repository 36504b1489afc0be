"""Whatever is kept of the prompts' context, a lookup gives what the VLM computes for each prompt on its own, in the same bits."""

import random
from collections import OrderedDict

import pytest
import torch

from latte_flow.model.context import encode_context, tokenize_prompts
from latte_flow.model.tiny_vlm import build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from latte_flow.training.data import context_cache
from latte_flow.training.data.context_cache import (
    FixedContextCache,
    LRUContextCache,
    PromptEncoder,
    UncachedContext,
    context_capacity,
    make_context_source,
)
from latte_flow.training.data.prompts import PromptTokens
from tests.unit.test_context import PROJECTIONS, assert_same_on_real_tokens, parts

TEXTS = ["A red apple.", "Seven geese fly over the old mill.", "", "Ünïcode: 数字 🐸", "A red apple."]
TEXTS += [f"{i} boats and {i + 1} ships" for i in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture(scope="module")
def vlm(tokenizer):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    built = build_tiny_vlm(tiny_vlm_config(tokenizer, **sizes, intermediate_size=64, initializer_range=0.15), seed=0)
    return built.requires_grad_(False)


def flat(context, rows):
    """All that a lookup says of some prompts, as one list of tensors."""
    picked = context.gather(rows)
    return [x for state in picked.states.values() for x in parts(state)] + [picked.mask, picked.position_ids]


@pytest.mark.parametrize("projection", PROJECTIONS)
class TestContents:
    @pytest.fixture
    def encoder(self, vlm, tokenizer, projection):
        return PromptEncoder(vlm, PromptTokens(tokenizer, TEXTS), projection)

    @pytest.mark.parametrize("capacity", [0, 7, len(TEXTS)])
    def test_equal_each_prompt_on_its_own(self, encoder, vlm, tokenizer, projection, capacity):
        source = make_context_source(encoder, capacity)
        for rows in ([0, 1, 1, 2, 3], [4, 5, 6], [33, 34], [0, 4]):
            context, places = source.lookup(torch.tensor(rows))
            for row, place in zip(rows, places, strict=True):
                alone = encode_context(vlm, tokenize_prompts(tokenizer, [TEXTS[row]]), projection)
                assert_same_on_real_tokens(context.gather(place[None]), alone)

    def test_are_the_same_bits_however_much_is_kept_and_whatever_was_asked_before(self, encoder):
        whole, uncached = FixedContextCache(encoder), UncachedContext(encoder)
        kept, few = LRUContextCache(encoder, 20), LRUContextCache(encoder, 6)
        draws = random.Random(0)
        for _ in range(30):
            rows = torch.tensor([draws.randrange(len(TEXTS)) for _ in range(6)])
            expected = flat(*whole.lookup(rows))
            for source in (uncached, kept, few):
                for ours, theirs in zip(flat(*source.lookup(rows)), expected, strict=True):
                    assert torch.equal(ours, theirs)

    def test_are_stored_in_the_type_asked_for_without_gradients(self, vlm, tokenizer, projection):
        encoder = PromptEncoder(vlm, PromptTokens(tokenizer, TEXTS), projection, torch.bfloat16)
        states = [x for state in FixedContextCache(encoder).context.states.values() for x in parts(state)]
        assert {x.dtype for x in states} == {torch.bfloat16}
        assert not any(x.requires_grad for x in states)
        assert encoder.bytes_per_prompt() == FixedContextCache(encoder).context.num_bytes / len(TEXTS)

    def test_of_distinct_prompts_differ_and_of_equal_prompts_do_not(self, encoder):
        """The prompt must reach the layers: compared is the last real token."""
        cache = FixedContextCache(encoder).context
        keys = parts(cache.states[1])[0]
        last = torch.stack([keys[row, n - 1] for row, n in enumerate(cache.mask.sum(1))]).flatten(1)
        assert (last[0] - last[1]).abs().max() > 0.05
        torch.testing.assert_close(last[0], last[4])


class TestLeastRecentlyUsed:
    def test_the_vlm_runs_for_what_an_ordered_dict_of_the_same_size_lacks(self, vlm, tokenizer, monkeypatch):
        encoder, runs = PromptEncoder(vlm, PromptTokens(tokenizer, TEXTS), "generation"), []
        encode = PromptEncoder.encode
        monkeypatch.setattr(PromptEncoder, "encode", lambda self, rows: runs.append(list(rows)) or encode(self, rows))
        cache, model, draws = LRUContextCache(encoder, 8), OrderedDict(), random.Random(1)
        for _ in range(60):
            rows = [min(int(draws.expovariate(0.2)), len(TEXTS) - 1) for _ in range(5)]
            runs.clear()
            cache.lookup(torch.tensor(rows))
            distinct = list(dict.fromkeys(rows))
            missing = [row for row in distinct if row not in model]
            assert runs == ([missing] if missing else [])
            for row in [row for row in distinct if row in model] + missing:
                model[row] = model.pop(row, None)
            while len(model) > 8:
                model.popitem(last=False)
        assert cache.hits > cache.misses > 8

    def test_a_lookup_of_more_prompts_than_fit_is_an_error(self, vlm, tokenizer):
        cache = LRUContextCache(PromptEncoder(vlm, PromptTokens(tokenizer, TEXTS), "generation"), 3)
        with pytest.raises(ValueError, match="3 prompts are kept, a lookup contains 4"):
            cache.lookup(torch.arange(4))
        with pytest.raises(ValueError, match="capacity: got 0"):
            LRUContextCache(PromptEncoder(vlm, PromptTokens(tokenizer, TEXTS), "generation"), 0)


NEEDS = {"num_prompts": 1001, "bytes_per_prompt": 2**20, "batch_prompts": 64}


class TestCapacity:
    @pytest.mark.parametrize(
        ("kind", "prompts_of_room", "kept"),
        [("auto", 1001, 1001), ("auto", 1000, 1000), ("all", 1001, 1001), ("lru", 5000, 1001), ("lru", 64, 64)],
    )
    def test_is_what_fits(self, kind, prompts_of_room, kept):
        assert context_capacity(kind, budget=prompts_of_room * 2**20, **NEEDS) == kept

    def test_none_keeps_none(self):
        assert context_capacity("none", budget=2**40, **NEEDS) == 0

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("all", "vlm.context_cache: all 1001 prompts need 0.9775 GiB"),
            ("lru", "at least 0.0625"),
            ("auto", "63 prom"),
        ],
    )
    def test_too_small_a_budget_is_an_error_that_says_what_would_do(self, kind, words):
        with pytest.raises(ValueError, match=words):
            context_capacity(kind, budget=63 * 2**20, **NEEDS)

    def test_all_fixed_some_lru_none_uncached(self, vlm, tokenizer):
        encoder = PromptEncoder(vlm, PromptTokens(tokenizer, TEXTS), "generation")
        kinds = [type(make_context_source(encoder, capacity)) for capacity in (len(TEXTS), 3, 0)]
        assert kinds == [FixedContextCache, LRUContextCache, UncachedContext]


def test_prompts_are_encoded_at_one_batch_size(vlm, tokenizer, monkeypatch):
    """Batches of many sizes would round differently, and a resumed run, whose cache is empty, would not repeat the bits."""
    sizes, encode = [], encode_context
    monkeypatch.setattr(
        context_cache,
        "encode_context",
        lambda v, inputs, p: sizes.append(inputs["input_ids"].shape) or encode(v, inputs, p),
    )
    encoder = PromptEncoder(vlm, PromptTokens(tokenizer, TEXTS), "generation")
    for count in (1, 5, len(TEXTS)):
        encoder.encode(range(count))
    assert len(set(sizes)) == 1
