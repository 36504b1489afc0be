"""A cache for the context of a frozen VLM's prompts, so that training does not run the VLM in every step (paper section 5).

Three implementations of one interface: ``lookup`` of a batch's prompt rows returns a context and the position of each row in it.

* ``FixedContextCache``: all prompts, computed once. For class prompts: 1001 prompts of 16 tokens take 1.4 GB at 2B.
* ``LRUContextCache``: the most recently used prompts, in fixed-size buffers. For captions, which are too many to keep.
* ``UncachedContext``: no caching.

All encode prompts in batches of a fixed size, padded to a fixed length, so that results are bit-identical regardless of which
prompts are encoded together, and a resumed run, whose cache is empty, trains exactly like an uninterrupted one.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from latte_flow.model.backbone import backbone_of
from latte_flow.model.context import Context, encode_context
from latte_flow.training.configs.fields import VlmConfig
from latte_flow.training.data.prompts import PromptTokens
from latte_flow.training.distributed.collectives import print_once
from latte_flow.training.errors import UserError

ENCODE_BATCH_SIZE = 16


class ContextSource(Protocol):
    """Source of the prompts' context for training and sampling."""

    def lookup(self, rows: Tensor) -> tuple[Context, Tensor]:
        """Return a context that holds the prompts of ``rows``, and the position of each in it.

        Args:
            rows: prompt rows, int64 on the CPU, [B].

        Returns:
            (context on the VLM's device, rows [B] on the same device). The context is valid until the next call.
        """


class PromptEncoder:
    """Runs a frozen VLM over prompts selected from a list, always in batches of ENCODE_BATCH_SIZE.

    Args:
        vlm: the frozen VLM; contexts are on its device.
        prompts: the tokens of all prompts.
        projection: ``generation`` or ``vlm`` (LatteFlowConfig.context_projection).
        dtype: dtype of the states; None keeps the VLM's.
    """

    def __init__(self, vlm, prompts: PromptTokens, projection: str, dtype: torch.dtype | None = None):
        self.vlm, self.prompts, self.projection, self.dtype = vlm, prompts, projection, dtype

    @property
    def num_prompts(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    @torch.no_grad()
    def encode(self, rows: Sequence[int]) -> Context:
        """Return the context of one or more prompts, in the given order."""
        result: Context | None = None
        for first in range(0, len(rows), ENCODE_BATCH_SIZE):
            chunk = list(rows[first : first + ENCODE_BATCH_SIZE])
            full = chunk + chunk[-1:] * (ENCODE_BATCH_SIZE - len(chunk))
            inputs = {name: tokens.to(self.vlm.device) for name, tokens in self.prompts.tokens(full).items()}
            context = encode_context(self.vlm, inputs, self.projection).to(dtype=self.dtype)
            if result is None:
                result = context.empty(len(rows))
            places = torch.arange(first, first + len(chunk), device=self.vlm.device)
            result.write(places, context.gather(places - first))
        assert result is not None  # at least one prompt
        return result

    def bytes_per_prompt(self) -> int:
        """Return the size of one prompt's states over all layers, in bytes."""
        config = self.vlm.config.text_config
        # Read from the weights: a VLM split over tensor-parallel ranks has only a part of the key heads.
        backbone = backbone_of(self.vlm.config)
        keys = len(backbone.decoder_layers(self.vlm)[0].get_parameter(f"{backbone.path('k_proj')}.weight"))
        numbers = config.hidden_size if self.projection == "generation" else 2 * keys
        return self.prompts.length * config.num_hidden_layers * numbers * (self.dtype or self.vlm.dtype).itemsize


class FixedContextCache:
    """The context of all prompts, computed once on creation; the VLM is not needed afterwards."""

    def __init__(self, encoder: PromptEncoder):
        self.context = encoder.encode(range(encoder.num_prompts))

    def lookup(self, rows: Tensor) -> tuple[Context, Tensor]:
        """See ContextSource."""
        return self.context, rows.to(self.context.mask.device, non_blocking=True)


class UncachedContext:
    """Encodes the prompts of every batch again."""

    def __init__(self, encoder: PromptEncoder):
        self._encoder = encoder

    def lookup(self, rows: Tensor) -> tuple[Context, Tensor]:
        """See ContextSource."""
        distinct, places = torch.unique(rows, return_inverse=True)
        context = self._encoder.encode(distinct.tolist())
        return context, places.to(context.mask.device)


class LRUContextCache:
    """The context of the most recently used prompts, in fixed-size buffers on the VLM's device.

    Args:
        encoder: encoder of the prompts.
        capacity: number of prompts to keep; also the maximum number of distinct prompts in a lookup.

    Raises:
        ValueError: when ``capacity`` is less than 1, or a lookup contains more distinct prompts than that.
    """

    def __init__(self, encoder: PromptEncoder, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity: got {capacity}; accepted: 1 or more prompts")
        self._encoder, self.capacity = encoder, capacity
        # prompt row -> place in the buffers, least recently used first
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._buffers: Context | None = None
        self.hits = self.misses = 0

    def lookup(self, rows: Tensor) -> tuple[Context, Tensor]:
        """See ContextSource. The buffers are written in place: gather from them before the next call."""
        distinct = dict.fromkeys(rows.tolist())
        if len(distinct) > self.capacity:
            raise ValueError(
                f"capacity: {self.capacity} prompts are kept, a lookup contains {len(distinct)} distinct ones"
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
        assert self._buffers is not None  # created by the first lookup
        return self._buffers, places.to(self._buffers.mask.device, non_blocking=True)

    def _store(self, rows: list[int]) -> None:
        """Encode prompts into free places, evicting the least recently used ones as needed."""
        free = list(range(len(self._slots), min(len(self._slots) + len(rows), self.capacity)))
        while len(free) < len(rows):
            free.append(self._slots.popitem(last=False)[1])
        self._slots.update(zip(rows, free, strict=True))
        context = self._encoder.encode(rows)
        if self._buffers is None:
            self._buffers = context.empty(self.capacity)
        self._buffers.write(torch.tensor(free, device=context.mask.device), context)


def context_capacity(kind: str, *, num_prompts: int, bytes_per_prompt: int, budget: float, batch_prompts: int) -> int:
    """Return the number of prompts whose context is kept: all, some, or none (0).

    Args:
        kind: ``all``, ``lru``, ``none``, or ``auto``: all if they fit into the budget, otherwise lru.
        num_prompts: number of prompts of the data, including the null prompt.
        bytes_per_prompt: see PromptEncoder.
        budget: bytes for the states.
        batch_prompts: maximum number of distinct prompts in one lookup.

    Raises:
        UserError: when the budget is too small for ``kind``; names the fields and what would be enough.
    """
    fitting = int(budget // bytes_per_prompt)
    if kind == "none":
        return 0
    if kind == "all" and num_prompts > fitting:
        raise UserError(
            f"vlm.context_cache: all {num_prompts} prompts need {num_prompts * bytes_per_prompt / 2**30:.4g} GiB, "
            f"vlm.context_cache_gib is {budget / 2**30:g}; accepted: a large enough value, or lru, or auto"
        )
    if kind in ("all", "auto") and num_prompts <= fitting:
        return num_prompts
    if fitting < min(batch_prompts, num_prompts):
        raise UserError(
            f"vlm.context_cache_gib: {budget / 2**30:g} holds {fitting} prompts, a batch may contain {batch_prompts}; "
            f"accepted: at least {batch_prompts * bytes_per_prompt / 2**30:.4g}, or vlm.context_cache none"
        )
    return min(fitting, num_prompts)


def make_context_source(encoder: PromptEncoder, capacity: int) -> ContextSource:
    """Return a source that keeps ``capacity`` prompts (see ``context_capacity``)."""
    if capacity == 0:
        return UncachedContext(encoder)
    if capacity == encoder.num_prompts:
        return FixedContextCache(encoder)
    return LRUContextCache(encoder, capacity)


def open_context_source(config: VlmConfig, encoder: PromptEncoder, *, batch_prompts: int) -> ContextSource:
    """Return the source of the prompts' context for a run, and print how much of it is kept.

    Args:
        config: how much may be kept.
        encoder: encoder of the run's prompts; its VLM is moved to the CPU if all prompts are kept.
        batch_prompts: maximum number of distinct prompts in one lookup.

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
    size = f"{num_prompts} prompts of {encoder.prompts.length} tokens, {bytes_per_prompt / 2**20:.3g} MiB each"
    print_once(f"context of the frozen VLM: {kept} of {size} kept on the device")
    source = make_context_source(encoder, capacity)
    if isinstance(source, FixedContextCache):
        encoder.vlm.cpu()
    return source
