"""The context of a prompt: what transformers' own forward pass of the VLM computes at each layer, and its bookkeeping."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AddedToken, Qwen2Tokenizer

from latte_flow.model.context import (
    Context,
    as_key_values,
    encode_context,
    message_ids,
    tokenize_prompts,
    truncate_prompts,
)
from latte_flow.model.tiny_vlm import SPECIAL_TOKENS, build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from tests.tiny import FAMILIES, PROMPTS, image_prompts, make_vlm, noise, text_prompts

LAYERS = 3
PROJECTIONS = ("generation", "vlm")
TEXTS = ["A red apple.", "Seven geese fly over the old mill.", "", "Ünïcode: 数字 🐸", "A red apple."]


@pytest.fixture(scope="module")
def vlm():
    return make_vlm(num_layers=LAYERS)


@pytest.fixture(scope="module", params=FAMILIES)
def any_vlm(request):
    return make_vlm(num_layers=LAYERS, family=request.param)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture(scope="module")
def tokenized_vlm(tokenizer):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return build_tiny_vlm(tiny_vlm_config(tokenizer, **sizes, intermediate_size=64, initializer_range=0.15), seed=0)


def parts(state: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The tensors of a layer's context with the tokens in dimension 1."""
    return tuple(x.transpose(1, 2) for x in state) if isinstance(state, tuple) else (state,)


def assert_same_on_real_tokens(a: Context, b: Context, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert a.states.keys() == b.states.keys()
    assert a.mask.sum(1).tolist() == b.mask.sum(1).tolist()
    for layer in a.states:
        for x, y in zip(parts(a.states[layer]), parts(b.states[layer]), strict=True):
            torch.testing.assert_close(x[a.mask], y[b.mask], rtol=rtol, atol=atol)
    assert torch.equal(a.position_ids[:, a.mask], b.position_ids[:, b.mask])


@pytest.mark.parametrize("kind", PROMPTS)
class TestIsWhatTransformersComputes:
    """A plain call of the VLM, which finds masks and positions on its own, is the independent side."""

    def test_states_are_what_each_layers_input_norm_puts_out(self, any_vlm, kind):
        vlm, inputs, seen = any_vlm, PROMPTS[kind](), []
        hooks = [
            layer.input_layernorm.register_forward_hook(lambda _, __, output: seen.append(output))
            for layer in vlm.model.language_model.layers
        ]
        vlm(**inputs)
        for hook in hooks:
            hook.remove()
        context = encode_context(vlm, inputs, "generation")
        real = inputs["attention_mask"].bool()
        assert list(context.states) == list(range(LAYERS))
        assert len(seen) == LAYERS
        for layer, expected in enumerate(seen):
            torch.testing.assert_close(context.states[layer][real], expected[real], rtol=1e-4, atol=1e-5)
        assert torch.equal(context.mask, real)

    def test_vlm_projection_is_the_vlms_cache(self, any_vlm, kind):
        vlm, inputs = any_vlm, PROMPTS[kind]()
        context = encode_context(vlm, inputs, "vlm")
        real = inputs["attention_mask"].bool()
        for layer, cached in enumerate(vlm(**inputs, use_cache=True).past_key_values.layers):
            for ours, theirs in zip(parts(context.states[layer]), parts((cached.keys, cached.values)), strict=True):
                torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("projection", PROJECTIONS)
    def test_any_layers_may_be_asked_for(self, vlm, kind, projection):
        all_layers = encode_context(vlm, PROMPTS[kind](), projection)
        some = encode_context(vlm, PROMPTS[kind](), projection, layers=[2, 0])
        assert list(some.states) == [2, 0]
        for layer in some.states:
            for x, y in zip(parts(some.states[layer]), parts(all_layers.states[layer]), strict=True):
                assert torch.equal(x, y)


def test_positions_of_a_picture_are_qwen2_vls():
    """By the rule of the Qwen2-VL paper: a picture's tokens share one time and count rows and columns; the text after it follows
    behind the largest position."""
    context = encode_context(make_vlm(num_layers=1), image_prompts(), "generation")
    first = context.position_ids[:, 0, context.mask[0]].tolist()
    # two words and <start>; 2 x 3 picture tokens from position 3 on; <end> and three words from 3 + 3 on
    assert first[0] == [0, 1, 2, *[3] * 6, 6, 7, 8, 9]
    assert first[1] == [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9]
    assert first[2] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("projection", PROJECTIONS)
class TestPadding:
    @pytest.mark.parametrize("kind", PROMPTS)
    def test_more_padding_changes_no_real_token(self, vlm, projection, kind):
        inputs = PROMPTS[kind]()
        wider = dict(inputs)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in inputs:
                wider[name] = torch.nn.functional.pad(inputs[name], (0, 4))
        plain, padded = (encode_context(vlm, i, projection) for i in (inputs, wider))
        assert_same_on_real_tokens(plain, padded)

    def test_padding_on_the_left_changes_no_real_token(self, vlm, projection):
        inputs = text_prompts()
        lengths = inputs["attention_mask"].sum(1).tolist()
        rolled = {
            name: torch.stack([row.roll(len(row) - n) for row, n in zip(x, lengths, strict=True)])
            for name, x in inputs.items()
        }
        assert_same_on_real_tokens(*(encode_context(vlm, i, projection) for i in (inputs, rolled)))

    def test_what_is_written_in_padding_does_not_matter(self, vlm, projection):
        inputs = text_prompts()
        other = {**inputs, "input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 33)}
        assert_same_on_real_tokens(*(encode_context(vlm, i, projection) for i in (inputs, other)), rtol=0, atol=0)

    def test_a_prompt_alone_has_the_context_it_has_in_a_batch(self, vlm, projection):
        inputs = text_prompts()
        batch = encode_context(vlm, inputs, projection)
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            alone = encode_context(vlm, {k: v[row : row + 1, :length] for k, v in inputs.items()}, projection)
            assert_same_on_real_tokens(batch.gather(torch.tensor([row])), alone)

    def test_all_states_are_finite(self, vlm, projection):
        """A NaN in padding would reach the image through 0 x NaN, and gradients too."""
        inputs = text_prompts((6, 1, 0))
        for state in encode_context(vlm, inputs, projection).states.values():
            assert all(x.isfinite().all() for x in parts(state))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_gradients_reach_the_vlm(projection):
    vlm = make_vlm(num_layers=2).requires_grad_(True)
    context = encode_context(vlm, text_prompts(), projection)
    sum(x.square().sum() for state in context.states.values() for x in parts(state)).backward()
    assert vlm.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("projection", PROJECTIONS)
class TestBookkeeping:
    @pytest.fixture
    def context(self, vlm, projection):
        return encode_context(vlm, text_prompts((5, 2, 4)), projection)

    def test_gather_picks_prompts_any_number_of_times_and_layers(self, context):
        rows = torch.tensor([2, 0, 2])
        picked = context.gather(rows, layers=[1])
        assert list(picked.states) == [1]
        assert picked.mask.sum(1).tolist() == [4, 5, 4]
        for i, row in enumerate(rows.tolist()):
            for x, y in zip(parts(picked.states[1]), parts(context.states[1]), strict=True):
                assert torch.equal(x[i], y[row])
            assert torch.equal(picked.position_ids[:, i], context.position_ids[:, row])

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["shorter second", "shorter first"])
    def test_concatenate_pads_the_shorter(self, vlm, projection, order):
        halves = [encode_context(vlm, text_prompts(lengths), projection) for lengths in ((6, 2), (3,))]
        first, second = (halves[i] for i in order)
        joined = first.concatenate(second)
        assert joined.mask.sum(1).tolist() == [*first.mask.sum(1).tolist(), *second.mask.sum(1).tolist()]
        assert joined.mask.shape == (3, 6)
        assert_same_on_real_tokens(joined.gather(torch.arange(len(first.mask))), first, 0, 0)
        assert_same_on_real_tokens(joined.gather(torch.arange(len(first.mask), 3)), second, 0, 0)
        for state in joined.states.values():
            for x in parts(state):
                assert x.shape[:2] == (3, 6)

    def test_to_casts_states_and_leaves_mask_and_positions(self, context):
        cast = context.to(dtype=torch.bfloat16)
        assert {x.dtype for state in cast.states.values() for x in parts(state)} == {torch.bfloat16}
        assert (cast.mask.dtype, cast.position_ids.dtype) == (torch.bool, torch.int64)
        moved = context.to("meta")
        assert {x.device.type for s in moved.states.values() for x in parts(s)} == {"meta"}
        assert moved.mask.device.type == moved.position_ids.device.type == "meta"

    def test_size_in_bytes(self, context, projection):
        """3 layers x 3 prompts x 5 tokens of width 64, or of 2 heads of 16 twice, in float32 and half of it in bfloat16."""
        numbers = 3 * 3 * 5 * {"generation": 64, "vlm": 2 * 2 * 16}[projection]
        assert context.num_bytes == 4 * numbers
        assert context.to(dtype=torch.bfloat16).num_bytes == 2 * numbers


def test_key_values_of_a_vlm_context_pass_unchanged(vlm):
    context = encode_context(vlm, text_prompts(), "vlm")
    for layer, key_values in as_key_values(context).items():
        assert key_values.key is context.states[layer][0]
        assert key_values.value is context.states[layer][1]
        assert key_values.mask is context.mask


class TestTokenizePrompts:
    def test_are_in_chat_format_without_loss(self, tokenizer):
        inputs = tokenize_prompts(tokenizer, TEXTS)
        for text, ids, mask in zip(TEXTS, inputs["input_ids"], inputs["attention_mask"], strict=True):
            assert tokenizer.decode(ids[mask.bool()]) == (
                f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            )

    def test_are_padded_on_the_right(self, tokenizer):
        mask = tokenize_prompts(tokenizer, TEXTS)["attention_mask"]
        assert mask[:, 0].all()
        assert (mask.diff(dim=1) <= 0).all()
        assert mask.sum(1).max() == mask.shape[1]

    def test_lose_their_end_beyond_a_number_of_tokens(self, tokenizer):
        lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
        assert truncate_prompts(tokenizer, TEXTS, None) == truncate_prompts(tokenizer, TEXTS, max(lengths)) == TEXTS
        for limit in range(1, max(lengths)):
            for text, cut, length in zip(TEXTS, truncate_prompts(tokenizer, TEXTS, limit), lengths, strict=True):
                assert text.startswith(cut)
                assert len(tokenizer(cut)["input_ids"]) <= limit
                assert (cut == text) == (length <= limit)

    def test_refuses_no_prompts(self, tokenizer):
        with pytest.raises(ValueError, match="prompts: got none"):
            tokenize_prompts(tokenizer, [])

    def test_refuses_a_tokenizer_without_chat_template(self):
        bare = build_tiny_tokenizer(TEXTS, vocab_size=300)
        bare.chat_template = None
        with pytest.raises(ValueError, match="no chat template"):
            tokenize_prompts(bare, TEXTS)


def test_context_of_an_image_prompt_sees_the_picture(vlm):
    inputs = image_prompts()
    other = {**inputs, "pixel_values": noise(*inputs["pixel_values"].shape, seed=99)}
    a, b = (encode_context(vlm, i, "generation").states[2] for i in (inputs, other))
    behind_first_picture = 9
    assert (a[0, behind_first_picture] - b[0, behind_first_picture]).abs().max() > 1e-3
    assert torch.equal(a[0, :3], b[0, :3])


def qwen2_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's own tokenizer over the tiny vocabulary, with the system message of Qwen2-VL's chat template."""
    model = json.loads(build_tiny_tokenizer(TEXTS, vocab_size=320).backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.chat_template = (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


TOKENIZERS = {"tiny": build_tiny_tokenizer(TEXTS, vocab_size=320), "qwen2": qwen2_tokenizer()}
CONTROL = set(range(len(SPECIAL_TOKENS)))
"""Numbers of the special tokens, first in both vocabularies."""


def in_chat_format(tokenizer, prompt: str) -> str:
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", TOKENIZERS)
class TestSpecialTokens:
    @pytest.mark.parametrize("token", SPECIAL_TOKENS)
    def test_in_a_prompt_are_text_and_those_of_the_template_are_not(self, name, token):
        tokenizer = TOKENIZERS[name]
        prompts = [f"a{token}b", token, f" {token}\n{token}", "a red apple"]
        inputs = tokenize_prompts(tokenizer, prompts)
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]
        plain = [number for number in rows[-1] if number in CONTROL]
        assert len(plain) >= 3
        for prompt, row in zip(prompts, rows, strict=True):
            assert tokenizer.decode(row) == in_chat_format(tokenizer, prompt)
            assert [number for number in row if number in CONTROL] == plain

    @given(prompts=st.lists(st.text(max_size=40), min_size=1, max_size=4))
    def test_prompts_without_any_are_tokenized_as_the_whole_chat(self, name, prompts):
        tokenizer = TOKENIZERS[name]
        texts = [in_chat_format(tokenizer, prompt) for prompt in prompts]
        expected = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        inputs = tokenize_prompts(tokenizer, prompts)
        assert inputs.keys() == {"input_ids", "attention_mask"}
        for key, tensor in inputs.items():
            assert torch.equal(tensor, expected[key])
            assert tensor.dtype == torch.int64
        longer = tokenize_prompts(tokenizer, [*prompts, "<|im_end|>" * 20])  # leaves the others as they are
        assert torch.equal(longer["input_ids"][:-1, : expected["input_ids"].shape[1]], expected["input_ids"])

    def test_count_as_text_where_prompts_are_truncated(self, name):
        tokenizer = TOKENIZERS[name]
        prompt = "a <|vision_start|><|image_pad|> b"
        for limit in (3, 8, 15):
            (cut,) = truncate_prompts(tokenizer, [prompt], limit)
            assert prompt.startswith(cut)
            assert len(tokenizer(cut, split_special_tokens=True)["input_ids"]) == limit
        assert truncate_prompts(tokenizer, [prompt], 100) == [prompt]


def test_the_placeholder_of_a_picture_stays_a_control_token(tokenizer):
    ids = message_ids(tokenizer, "Is <|image_pad|> one?", with_image=True)
    start = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Is <|image_pad|> one?<|im_end|>\n"
    assert tokenizer.decode(ids).startswith(start)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 1
