"""The context of a frozen VLM's prompts, kept so that training does not run the VLM in every step (paper section 5).

Three ways, one interface: ``lookup`` of a batch's prompt rows gives a context and where in it each row is.

* ``FixedContextCache``: all prompts, computed once. For class prompts: 1001 prompts of 16 tokens take 1.4 GB at 2B.
* ``LRUContextCache``: the most recently used prompts, in buffers of fixed size. For captions, which are too many to keep.
* ``UncachedContext``: nothing is kept.

All encode prompts in batches of one size, padded to one length, so that all give the same bits: which prompts happen to be
encoded together does not show, and a resumed run, whose cache is empty, trains what an uninterrupted one does.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from latte_flow.model.context import Context, encode_context, tokenize_prompts
from latte_flow.training.configs.fields import VlmConfig
from latte_flow.training.distributed.collectives import print_once
from latte_flow.training.errors import UserError

ENCODE_BATCH_SIZE = 16


class ContextSource(Protocol):
    """Where training and sampling read the context of prompts from."""

    def lookup(self, rows: Tensor) -> tuple[Context, Tensor]:
        """Return a context that holds the prompts of ``rows``, and the row of each in it.

        Args:
            rows: prompt rows, int64 on the CPU, [B].

        Returns:
            (context on the VLM's device, rows [B] on the same device). The context is valid until the next call.
        """


class PromptEncoder:
    """Runs a frozen VLM over some of a list of prompts, always ENCODE_BATCH_SIZE at once.

    Args:
        vlm: the frozen VLM; contexts live on its device.
        tokenizer: the VLM's tokenizer.
        prompts: row i is prompt i.
        projection: ``generation`` or ``vlm`` (LatteFlowConfig.context_projection).
        dtype: the type of the states; None keeps the VLM's.
    """

    def __init__(self, vlm, tokenizer, prompts: Sequence[str], projection: str, dtype: torch.dtype | None = None):
        self.vlm, self.projection, self.dtype = vlm, projection, dtype
        self.inputs = tokenize_prompts(tokenizer, prompts)

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return len(self.inputs["input_ids"])

    @torch.no_grad()
    def encode(self, rows: Sequence[int]) -> Context:
        """Return the context of some prompts, at least one, in their order."""
        result: Context | None = None
        for first in range(0, len(rows), ENCODE_BATCH_SIZE):
            chunk = list(rows[first : first + ENCODE_BATCH_SIZE])
            full = chunk + chunk[-1:] * (ENCODE_BATCH_SIZE - len(chunk))
            inputs = {name: tokens[full].to(self.vlm.device) for name, tokens in self.inputs.items()}
            context = encode_context(self.vlm, inputs, self.projection).to(dtype=self.dtype)
            if result is None:
                result = context.empty(len(rows))
            places = torch.arange(first, first + len(chunk), device=self.vlm.device)
            result.write(places, context.gather(places - first))
        assert result is not None  # at least one prompt
        return result

    def bytes_per_prompt(self) -> int:
        """Return the size of one prompt's states, all layers, in bytes."""
        config = self.vlm.config.text_config
        # Asked of the weights: a VLM that is split over ranks has a part of the key heads.
        keys = len(self.vlm.model.language_model.layers[0].self_attn.k_proj.weight)
        numbers = config.hidden_size if self.projection == "generation" else 2 * keys
        length = self.inputs["input_ids"].shape[1]
        return length * config.num_hidden_layers * numbers * (self.dtype or self.vlm.dtype).itemsize


class FixedContextCache:
    """The context of all prompts, computed here once; the VLM is not needed afterwards."""

    def __init__(self, encoder: PromptEncoder):
        self.context = encoder.encode(range(encoder.num_prompts))

    def lookup(self, rows: Tensor) -> tuple[Context, Tensor]:
        """See ContextSource."""
        return self.context, rows.to(self.context.mask.device, non_blocking=True)


class UncachedContext:
    """Encodes the prompts of every batch anew."""

    def __init__(self, encoder: PromptEncoder):
        self._encoder = encoder

    def lookup(self, rows: Tensor) -> tuple[Context, Tensor]:
        """See ContextSource."""
        distinct, places = torch.unique(rows, return_inverse=True)
        context = self._encoder.encode(distinct.tolist())
        return context, places.to(context.mask.device)


class LRUContextCache:
    """The context of the most recently used prompts, in buffers of fixed size on the VLM's device.

    Args:
        encoder: of the prompts.
        capacity: how many prompts to keep; a lookup may name as many different ones.

    Raises:
        ValueError: when ``capacity`` is less than 1, or a lookup names more different prompts.
    """

    def __init__(self, encoder: PromptEncoder, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity: got {capacity}; accepted: 1 or more prompts")
        self._encoder, self.capacity = encoder, capacity
        # Prompt row -> place in the buffers, least recently used first.
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._buffers: Context | None = None
        self.hits = self.misses = 0

    def lookup(self, rows: Tensor) -> tuple[Context, Tensor]:
        """See ContextSource. The buffers are written in place: gather from them before the next call."""
        distinct = dict.fromkeys(rows.tolist())
        if len(distinct) > self.capacity:
            raise ValueError(
                f"capacity: {self.capacity} prompts are kept, a lookup names {len(distinct)} different ones"
            )
        missing = [row for row in distinct if row not in self._slots]
        for row in distinct:
            if row in self._slots:
                self._slots.move_to_end(row)
        self.hits += len(distinct) - len(missing)
        self.misses += len(missing)
        if missing:
            self._store(missing)
        places = torch.tensor([self._slots[row] for row in rows.tolist()])
        assert self._buffers is not None  # made by the first lookup
        return self._buffers, places.to(self._buffers.mask.device, non_blocking=True)

    def _store(self, rows: list[int]) -> None:
        """Encode prompts into free places, after dropping as many of the least recently used as that needs."""
        free = list(range(len(self._slots), min(len(self._slots) + len(rows), self.capacity)))
        while len(free) < len(rows):
            free.append(self._slots.popitem(last=False)[1])
        self._slots.update(zip(rows, free, strict=True))
        context = self._encoder.encode(rows)
        if self._buffers is None:
            self._buffers = context.empty(self.capacity)
        self._buffers.write(torch.tensor(free, device=context.mask.device), context)


def context_capacity(kind: str, *, num_prompts: int, bytes_per_prompt: int, budget: float, batch_prompts: int) -> int:
    """Return how many prompts a configuration keeps the context of: all of them, some, or none (0).

    Args:
        kind: ``all``, ``lru``, ``none``, or ``auto``: all when they fit into the budget, else lru.
        num_prompts: of the data, the null prompt included.
        bytes_per_prompt: see PromptEncoder.
        budget: bytes for the states.
        batch_prompts: the most different prompts that one lookup names.

    Raises:
        UserError: when the budget does not hold what ``kind`` needs; it names the fields and what would do.
    """
    fitting = int(budget // bytes_per_prompt)
    if kind == "none":
        return 0
    if kind == "all" and num_prompts > fitting:
        raise UserError(
            f"vlm.context_cache: all {num_prompts} prompts need {num_prompts * bytes_per_prompt / 2**30:.4g} GiB, "
            f"vlm.context_cache_gib is {budget / 2**30:g}; accepted: that much, or lru, or auto"
        )
    if kind in ("all", "auto") and num_prompts <= fitting:
        return num_prompts
    if fitting < min(batch_prompts, num_prompts):
        raise UserError(
            f"vlm.context_cache_gib: {budget / 2**30:g} holds {fitting} prompts, a batch may name {batch_prompts}; "
            f"accepted: at least {batch_prompts * bytes_per_prompt / 2**30:.4g}, or vlm.context_cache none"
        )
    return min(fitting, num_prompts)


def make_context_source(encoder: PromptEncoder, capacity: int) -> ContextSource:
    """Return the source that keeps as many prompts (``context_capacity``)."""
    if capacity == 0:
        return UncachedContext(encoder)
    if capacity == encoder.num_prompts:
        return FixedContextCache(encoder)
    return LRUContextCache(encoder, capacity)


def open_context_source(config: VlmConfig, encoder: PromptEncoder, *, batch_prompts: int) -> ContextSource:
    """Return where a run reads the context of its prompts from, and print how much of it is kept.

    Args:
        config: how much may be kept.
        encoder: of the run's prompts; its VLM is moved to the CPU when training needs no more of it than is kept.
        batch_prompts: the most different prompts that one lookup names.

    Raises:
        UserError: as ``context_capacity``.
    """
    num_prompts, bytes_per_prompt = encoder.num_prompts, encoder.bytes_per_prompt()
    capacity = context_capacity(
        config.context_cache,
        num_prompts=num_prompts,
        bytes_per_prompt=bytes_per_prompt,
        budget=config.context_cache_gib * 2**30,
        batch_prompts=batch_prompts,
    )
    kept = {0: "none", num_prompts: "all"}.get(capacity, f"the {capacity} most recently used")
    size = f"{num_prompts} prompts of {bytes_per_prompt / 2**20:.3g} MiB each"
    print_once(f"context of the frozen VLM: {kept} of {size} kept on the device")
    source = make_context_source(encoder, capacity)
    if isinstance(source, FixedContextCache):
        encoder.vlm.cpu()
    return source
