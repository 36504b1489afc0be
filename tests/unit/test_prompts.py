"""Prompts: texts in Arrow, tokens on demand, one length for all batches, and no memory per caption beyond its text."""

import json
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pytest
import torch
from datasets.table import InMemoryTable

from latte_flow.model.context import encode_context, message_ids, tokenize_prompts, truncate_prompts
from latte_flow.training.data import prompts as prompts_module
from latte_flow.training.data.prompts import LENGTH_MULTIPLE, PromptTokens, StoredTexts, make_prompts
from tests.unit.test_context import TEXTS, tokenized_vlm, tokenizer  # noqa: F401  # fixtures

CAPTIONS = ["a cat", "", "Ünïcode: 数字 🐸", "<|im_end|>" * 9, "seven geese fly over the old mill " * 3, "{braces}"]


@pytest.fixture
def many(monkeypatch):
    """Have any number of prompts count as many."""
    monkeypatch.setattr(prompts_module, "FEW_PROMPTS", 0)


def test_stored_texts_are_those_texts_in_their_template():
    texts = StoredTexts(pa.array(CAPTIONS))
    assert list(texts) == CAPTIONS
    assert list(make_prompts("a {}!", texts)) == make_prompts("a {}!", CAPTIONS) == [f"a {text}!" for text in CAPTIONS]


@pytest.mark.parametrize("limit", [None, 7, 100])
def test_few_prompts_have_the_tokens_they_have_together(tokenizer, limit):  # noqa: F811
    """Padded to the longest, as when all are tokenized at once."""
    prompts = PromptTokens(tokenizer, CAPTIONS, null_prompt="nothing", max_tokens=limit)
    messages = truncate_prompts(tokenizer, [*CAPTIONS, "nothing"], limit)
    together = tokenize_prompts(tokenizer, messages)
    for name, tokens in prompts.tokens(range(len(prompts))).items():
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, together[name])
    assert prompts.truncated == sum(ours != whole for ours, whole in zip(messages[:-1], CAPTIONS, strict=True))
    picked = prompts.tokens([6, 2, 2])
    assert torch.equal(picked["input_ids"], together["input_ids"][[6, 2, 2]])


def test_many_prompts_are_padded_to_the_limit_without_a_look_at_them(tokenizer, many):  # noqa: F811
    asked = []

    class Watched(list):
        def __getitem__(self, row):
            asked.append(row)
            return super().__getitem__(row)

    prompts = PromptTokens(tokenizer, Watched(CAPTIONS), null_prompt="", max_tokens=20)
    assert asked == []
    chat_format = len(message_ids(tokenizer, ""))
    assert prompts.length % LENGTH_MULTIPLE == 0
    assert 20 + chat_format <= prompts.length < 20 + chat_format + LENGTH_MULTIPLE
    for rows in ([0], [4, 0], [3, 2, 1]):
        tokens = prompts.tokens(rows)
        assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (len(rows), prompts.length)
    assert asked == [0, 4, 3, 2, 1]  # each once
    (cut,) = truncate_prompts(tokenizer, [CAPTIONS[0]], 20)
    assert prompts.tokens([0])["input_ids"][0, : len(message_ids(tokenizer, cut))].tolist() == message_ids(
        tokenizer, cut
    )


@pytest.mark.parametrize("extra", range(1, 8))
def test_a_prompt_that_has_more_tokens_again_after_it_was_truncated_fits(tokenizer, many, monkeypatch, extra):  # noqa: F811
    """The limit counts a prompt's own tokens; what it has in the chat format may be more."""
    whole = prompts_module.tokenize_prompts

    def longer(tokenizer, texts):
        tokens = whole(tokenizer, texts)
        ids = tokens["input_ids"]
        return {"input_ids": torch.cat([ids, ids[:, :1].expand(-1, extra * (ids.shape[1] // 8))], dim=1)}

    prompts = PromptTokens(tokenizer, CAPTIONS, max_tokens=30)
    monkeypatch.setattr(prompts_module, "tokenize_prompts", longer)
    for row in range(len(CAPTIONS)):
        assert prompts.tokens([row])["input_ids"].shape == (1, prompts.length)


@pytest.mark.parametrize("num_rows", [2, 3, 9])
def test_a_batch_reads_the_same_context_whether_all_prompts_or_its_own_are_encoded(tokenized_vlm, tokenizer, num_rows):  # noqa: F811
    prompts = PromptTokens(tokenizer, TEXTS)
    rows = torch.arange(num_rows) % len(TEXTS)
    everything = encode_context(tokenized_vlm, prompts.tokens(range(len(TEXTS))), "generation").gather(rows)
    selected, selected_rows = prompts.lookup(rows)
    assert len(selected["input_ids"]) == min(num_rows, len(TEXTS))
    own = encode_context(tokenized_vlm, selected, "generation").gather(selected_rows)
    assert torch.equal(own.mask, everything.mask)
    for layer, states in everything.states.items():
        torch.testing.assert_close(own.states[layer], states)


def test_no_prompt_at_all_is_an_error(tokenizer):  # noqa: F811
    with pytest.raises(ValueError, match="prompts: got none"):
        PromptTokens(tokenizer, [])


# --- memory ----------------------------------------------------------------------------------------------------------------

NUM_CAPTIONS = 1_000_000
RANK = """
import json, re, sys
import torch
from latte_flow.model.tiny_vlm import build_tiny_tokenizer
from latte_flow.training import main  # all that a rank imports
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.prompts import PromptTokens

def peak():  # not ru_maxrss, which begins at that of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = peak()
images = load_image_dataset(DataConfig(dataset="saved", path=sys.argv[1], resolution=8))
tokenizer = build_tiny_tokenizer(images.prompts[row] for row in range(1000))
prompts = PromptTokens(tokenizer, images.prompts, null_prompt="", max_tokens=256)
generator = torch.Generator().manual_seed(0)
for _ in range(20):
    rows = torch.randint(len(prompts), (64,), generator=generator)
    tokens, places = prompts.lookup(rows)
print(json.dumps({"prompts": len(prompts), "bytes": peak() - before, "shape": tokens["input_ids"].shape}))
"""


@pytest.mark.slow
def test_a_million_captions_take_less_than_a_gib_on_a_rank(tmp_path):
    """More than a rank without data takes: the captions, their rows, and the tokens of some batches."""
    from tests.unit.test_sources import png

    captions = pa.array(
        [f"a photo of object {i} beside object {i * 7919 % 1000003}, taken at noon" for i in range(NUM_CAPTIONS)]
    )
    picture = pa.array([{"bytes": png(0), "path": None}])
    table = pa.table({"image": picture.take(pa.array([0] * NUM_CAPTIONS)), "text": captions})
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    datasets.Dataset(InMemoryTable(table.replace_schema_metadata(metadata))).save_to_disk(tmp_path / "saved")
    command = [sys.executable, "-c", RANK, str(tmp_path / "saved")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["prompts"] == NUM_CAPTIONS + 1
    assert found["shape"] == [64, 288]
    assert (
        0 < found["bytes"] < 768 * 2**20
    )  # 400 MiB of it are the table's file, which is mapped and shared by all ranks
