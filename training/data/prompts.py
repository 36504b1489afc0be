"""The prompts of a run: texts kept in Arrow, and their tokens, computed when a batch needs them.

12 million captions as Python strings take 3 GB, their tokens padded to the longest 50 GB.

Shapes: S context tokens, to which every prompt of a run is padded.
"""

from collections.abc import Sequence
from functools import lru_cache

import pyarrow as pa
import torch
from torch import Tensor

from latte_flow.model.context import tokenize_prompts, truncate_prompts

FEW_PROMPTS = 1 << 15
"""Up to this many prompts are tokenized at the start, and padded to the longest."""
LENGTH_MULTIPLE = 32
KEPT_PROMPTS = 1 << 16
"""The tokens of this many prompts are kept: about 20 MB."""


class StoredTexts(Sequence[str]):
    """Texts in an Arrow array, each put into a template when it is read.

    Args:
        texts: array of strings.
        template: ``{}`` stands for the text.
    """

    def __init__(self, texts: pa.Array, template: str = "{}"):
        self.texts, self.template = texts, template

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # nobody takes slices
        return self.template.format(self.texts[int(index)].as_py())


def make_prompts(template: str, captions: Sequence[str]) -> Sequence[str]:
    """Return the user messages for captions or class names."""
    if isinstance(captions, StoredTexts):
        return StoredTexts(captions.texts, template)
    return [template.format(caption) for caption in captions]


class PromptTokens:
    """The tokens of prompts in the VLM's chat format.

    All are padded to the same length S, which depends on the data and the configuration, never on a batch. Up to FEW_PROMPTS
    prompts: the longest of them. More are too many to tokenize at every start: ``max_tokens`` and the tokens of the chat format,
    rounded up to a multiple of LENGTH_MULTIPLE.

    Args:
        tokenizer: the VLM's tokenizer.
        prompts: row i is prompt i.
        null_prompt: the row after the last prompt; None for no such row.
        max_tokens: longer prompts lose their end; None keeps all.

    Attributes:
        length: S.
        truncated: number of prompts that were truncated so far; of few prompts, of all.

    Raises:
        ValueError: when there is no prompt, or the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer, prompts: Sequence[str], *, null_prompt: str | None = None, max_tokens: int | None = None
    ):
        self._tokenizer, self._prompts = tokenizer, prompts
        self._null_prompt, self._max_tokens = null_prompt, max_tokens
        self._ids = lru_cache(KEPT_PROMPTS)(self._tokenize)
        self.truncated, self.length = 0, 0
        if len(self) <= FEW_PROMPTS or max_tokens is None:
            self.length = max((len(self._ids(row)) for row in range(len(self))), default=0)
        else:
            longest = max_tokens + len(tokenize_prompts(tokenizer, [""])["input_ids"][0])
            self.length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        if not self.length:
            raise ValueError("prompts: got none; at least one prompt is needed")

    def __len__(self) -> int:
        return len(self._prompts) + (self._null_prompt is not None)

    def tokens(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask of some prompts, int64 [len(rows), S]."""
        ids = torch.full((len(rows), self.length), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            own = self._ids(int(row))
            ids[place, : len(own)], mask[place, : len(own)] = own, 1
        return {"input_ids": ids, "attention_mask": mask}

    def lookup(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the tokens to encode for a batch, and each sample's row among them.

        All P prompts when there are no more of them than samples, otherwise one a sample: whichever is less work. The choice
        depends on shapes alone, so it is the same in every step.

        Args:
            rows: the prompt of each sample, integers on the CPU, [B].
        """
        if len(self) <= len(rows):
            return self.tokens(range(len(self))), rows
        return self.tokens(rows.tolist()), torch.arange(len(rows))

    def _tokenize(self, row: int) -> Tensor:
        """Return the tokens of one prompt, int32."""
        prompt = self._null_prompt if row == len(self._prompts) else self._prompts[row]
        assert prompt is not None, "a row of the prompts"
        limit = self._max_tokens
        while True:
            (text,) = truncate_prompts(self._tokenizer, [prompt], limit)
            (ids,) = tokenize_prompts(self._tokenizer, [text])["input_ids"]
            if not self.length or limit is None or len(ids) <= self.length:
                break
            # A truncated text may have more tokens again, and the chat format adds some.
            limit -= len(ids) - self.length
        self.truncated += text != prompt
        return ids.int()
