"""Joint attention of image queries over [context ; image] keys with residual attention maps (paper Eq. 2-3, Appendix A).

Image queries attend, under one softmax, to the context's keys (the multimodal tokens) and to the image's own keys. The
image-to-image logits of a layer receive the previous layer's, weighted per head by a timestep-dependent gate:

    A~^{l+1} = A^{l+1} + g(t) A^l          (Eq. 3; context columns get no residual)

Two ways to compute it, equal up to rounding:

* materialise the maps and add them (``reference``): returns the maps, differentiable, and the fast way at 64 tokens;
* concatenate heads: softmax(q1 k1^T + g q0 k0^T) = softmax([q1, g q0] [k1, k0]^T), with zeros in place of k0 for context
  keys. No map is materialised, so any fused kernel can do it (``sdpa``, ``flash``).

What a layer passes to the next one is a ``Residual``: the maps for ``reference``, the queries and keys that make them for the
others. It is opaque to the layers.

Shapes: B batch, H query heads, G key/value heads (G divides H), N image tokens, S context tokens, E head_dim.
"""

import functools
import importlib.util
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from latte_flow.model.errors import ArgumentError

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "sdpa", "flash")
RESIDUAL_SOURCES = ("raw", "accumulated")
RESIDUAL_SPACES = ("logits", "probabilities")

REFERENCE_MAX_TOKENS = 256
"""``auto`` materialises maps up to this many image tokens; above, N^2 memory outweighs what a fused kernel costs to feed."""
FLASH_MAX_HEAD_DIM = 256
"""Largest head_dim of flash-attn 2; the concatenated heads of a residual layer are twice the model's."""
FLASH_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Residual:
    """What a layer's attention passes to the next layer of its group.

    Exactly one form is set: ``maps`` [B, H, N, N] by ``reference``; ``query`` [B, H, N, E'] and ``key`` [B, G, N, E'] by the
    backends that concatenate heads (E' grows by E a layer for ``residual_source: accumulated``).
    """

    maps: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None


@dataclass(frozen=True)
class ContextKeyValues:
    """Keys and values of the context, rotated, and which of its tokens are real.

    Attributes:
        key: [B, G, S, E].
        value: [B, G, S, E].
        mask: [B, S] bool, True for real tokens, False for padding.
    """

    key: Tensor
    value: Tensor
    mask: Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """How joint attention is computed: the backend and what the residual is.

    Args:
        backend: ``reference`` | ``sdpa`` | ``flash`` | ``auto``. ``auto`` takes ``reference`` up to 256 image tokens and
            wherever only it can do what is asked; above, ``flash`` when flash-attn, a CUDA device and a head_dim it can
            take are there, else ``sdpa``.
        residual: whether layers pass maps to the next layer at all.
        residual_source: ``raw``, the previous layer's own map (Eq. 3 read literally), or ``accumulated``, its augmented one.
        residual_space: ``logits`` (pre-softmax maps) or ``probabilities`` (post-softmax maps, added before the product with
            the values, as Eq. 2 prints them).
        head_dim: E.
        num_image_tokens: N.
        scale: of the products of queries and keys; None for 1 / sqrt(E).

    Raises:
        ArgumentError: when a value is unknown or the backend cannot compute the combination.
    """

    backend: str
    residual: bool
    residual_source: str
    residual_space: str
    head_dim: int
    num_image_tokens: int
    scale: float | None = None

    def __post_init__(self):
        if self.scale is None:
            object.__setattr__(self, "scale", self.head_dim**-0.5)
        for name, accepted in (
            ("backend", BACKENDS),
            ("residual_source", RESIDUAL_SOURCES),
            ("residual_space", RESIDUAL_SPACES),
        ):
            if getattr(self, name) not in accepted:
                field = "attention_backend" if name == "backend" else name
                raise ArgumentError(
                    f"{field}: {getattr(self, name)!r} is unknown; accepted values: {', '.join(accepted)}"
                )
        if self.backend == "auto":
            object.__setattr__(self, "backend", self._choose())
            logger.info("attention_backend auto: %s", self.backend)
            return
        reason = self._refusal(self.backend)
        if reason is not None:
            raise ArgumentError(f"attention_backend: {self.backend} {reason}")

    def _refusal(self, backend: str) -> str | None:
        """Return why a backend cannot compute this combination, or None when it can."""
        if backend == "reference":
            return None
        if self.residual and self.residual_space == "probabilities":
            return "cannot add residual_space: probabilities after its softmax; accepted: attention_backend: reference"
        if backend == "sdpa":
            return None
        if self.residual and self.residual_source == "accumulated":
            return (
                "cannot take residual_source: accumulated, whose concatenated heads outgrow the kernel; "
                "accepted: residual_source: raw, or attention_backend: reference or sdpa"
            )
        widest = self.head_dim * (2 if self.residual else 1)
        if widest > FLASH_MAX_HEAD_DIM:
            return (
                f"takes head sizes up to {FLASH_MAX_HEAD_DIM}, and the (concatenated) heads here have {widest}; "
                "accepted: reference, sdpa"
            )
        if importlib.util.find_spec("flash_attn") is None:
            return "needs the package flash-attn (pip install -e '.[gpu]' on a CUDA machine); accepted: reference, sdpa"
        return None

    def _choose(self) -> str:
        if self.num_image_tokens <= REFERENCE_MAX_TOKENS or self._refusal("sdpa") is not None:
            return "reference"
        return "flash" if torch.cuda.is_available() and self._refusal("flash") is None else "sdpa"


def _flash_takes(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in FLASH_DTYPES


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    spec: AttentionSpec,
    context: ContextKeyValues | None = None,
    previous: Residual | None = None,
    gate: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Residual | None]:
    """Attend from image queries to [context ; image] keys, with the previous layer's residual map.

    Args:
        query: rotated image queries, [B, H, N, E].
        key: rotated image keys, [B, G, N, E].
        value: image values, [B, G, N, E].
        spec: the backend and the residual's definition.
        context: the context's keys and values; None for no context.
        previous: residual of the previous layer of the group; None for a group's first layer.
        gate: g(t) of each sample and head in (-1, 1), [B, H]; given exactly when ``previous`` is.
        causal: whether image query i sees image keys up to i only (all of the context either way).

    Returns:
        The attention's output [B, N, H * E], and the residual for the next layer (None when ``spec.residual`` is off).
    """
    assert (previous is None) == (gate is None), "a residual map comes with its gate"
    assert spec.residual or previous is None, "a residual map was given to an attention that has none"
    backend = {"reference": _reference, "sdpa": _sdpa, "flash": _flash}[spec.backend]
    if spec.backend == "flash" and not _flash_takes(query):
        _warn_once(
            f"attention_backend flash takes {FLASH_DTYPES} on CUDA; {query.dtype} on {query.device.type} uses sdpa instead"
        )
        backend = _sdpa
    output, residual = backend(query, key, value, spec, context, previous, gate, causal)
    return output, residual if spec.residual else None


def _reference(query, key, value, spec, context, previous, gate, causal):
    """Materialise the maps. Logits, softmax and residual sums are float32 at least."""
    n, wide = query.shape[2], torch.promote_types(query.dtype, torch.float32)
    heads_per_group = query.shape[1] // key.shape[1]

    def logits_of(keys):  # [B, G, T, E] -> [B, H, N, T]; the query heads of a group share its keys without copying them
        q = rearrange(query, "b (g r) n e -> b g (r n) e", r=heads_per_group)
        # Not after the product: it would be rounded to bfloat16's 8 bits, or overflow float16, with the VLM's large key biases.
        logits = q.to(wide) @ keys.to(wide).transpose(-1, -2) * spec.scale
        return rearrange(logits, "b g (r n) t -> b (g r) n t", r=heads_per_group)

    own_map = logits_of(key)
    augmented = own_map
    if previous is not None and spec.residual_space == "logits":
        augmented = own_map + gate.to(own_map.dtype)[:, :, None, None] * previous.maps
    logits = augmented
    if causal:
        future = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(future, float("-inf"))
    if context is not None:
        context_logits = logits_of(context.key).masked_fill(~context.mask[:, None, None, :], float("-inf"))
        logits = torch.cat([context_logits, logits], dim=-1)
        value = torch.cat([context.value, value], dim=2)
    weights = logits.softmax(dim=-1)

    if spec.residual_space == "probabilities":
        own_map = augmented = weights[..., -n:]
        if previous is not None:
            augmented = own_map + gate.to(own_map.dtype)[:, :, None, None] * previous.maps
            weights = torch.cat([weights[..., :-n], augmented], dim=-1)

    weights = rearrange(weights.to(value.dtype), "b (g r) n t -> b g (r n) t", r=heads_per_group)
    output = rearrange(weights @ value, "b g (r n) e -> b n (g r e)", r=heads_per_group)
    return output, Residual(maps=own_map if spec.residual_source == "raw" else augmented)


def _concatenate_heads(query, key, spec, previous, gate):
    """Return (query, key, residual) with the previous layer's heads appended, weighted by the gate (module docstring)."""
    if previous is None:
        return query, key, Residual(query=query, key=key)
    gated = gate.to(query.dtype)[:, :, None, None] * previous.query
    wide_query, wide_key = torch.cat([query, gated], dim=-1), torch.cat([key, previous.key], dim=-1)
    raw = spec.residual_source == "raw"
    return wide_query, wide_key, Residual(query=query if raw else wide_query, key=key if raw else wide_key)


def _sdpa(query, key, value, spec, context, previous, gate, causal):
    """torch's scaled_dot_product_attention over concatenated heads; it takes keys wider than the values."""
    wide_query, wide_key, residual = _concatenate_heads(query, key, spec, previous, gate)
    n = query.shape[2]
    mask = None
    if causal:
        mask = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
    if context is not None:
        context_key = F.pad(context.key, (0, wide_key.shape[-1] - spec.head_dim))
        wide_key, value = torch.cat([context_key, wide_key], dim=2), torch.cat([context.value, value], dim=2)
        image_mask = torch.ones(n, n, dtype=torch.bool, device=query.device) if mask is None else mask
        mask = torch.cat([repeat(context.mask, "b s -> b 1 n s", n=n), image_mask.expand(len(query), 1, n, n)], dim=-1)
    if mask is not None and query.is_cuda:
        # CUDA's fused kernels take either a mask or grouped heads; with both, torch would materialise the maps in float32.
        wide_key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (wide_key, value))
    output = F.scaled_dot_product_attention(
        wide_query, wide_key, value, attn_mask=mask, scale=spec.scale, enable_gqa=True
    )
    return rearrange(output, "b h n e -> b n (h e)"), residual


def _flash(query, key, value, spec, context, previous, gate, causal):
    """flash-attn's varlen kernel over packed [context_i ; image_i] keys and concatenated heads."""
    from flash_attn import flash_attn_varlen_func

    wide_query, wide_key, residual = _concatenate_heads(query, key, spec, previous, gate)
    width = wide_query.shape[-1]
    arguments = flash_varlen_arguments(wide_query, wide_key, F.pad(value, (0, width - spec.head_dim)), context, causal)
    output = flash_attn_varlen_func(**arguments, softmax_scale=spec.scale)[..., : spec.head_dim]
    return rearrange(output, "(b n) h e -> b n (h e)", b=len(query)), residual


def flash_varlen_arguments(query, key, value, context: ContextKeyValues | None, causal: bool) -> dict:
    """Return the tensor arguments of ``flash_attn_varlen_func`` for one batch.

    Every sequence is packed to its real tokens, [context_i without padding ; image_i], without a host synchronisation: a stable
    sort moves the padding of all sequences to the end of the buffer, behind the last sequence, where the kernel does not look.

    Args:
        query: [B, H, N, W]. key, value: [B, G, N, W]; W >= E the (padded) head size, the kernel wants it equal.
        context: keys and values of width E <= W, padded with zeros here.
        causal: as in ``joint_attention``; the kernel aligns its mask to the end of the keys, so the context stays visible.
    """
    batch, _, n, width = query.shape
    s = 0 if context is None else context.key.shape[2]
    if context is not None:
        # where(), not a product: beyond the last sequence the kernel leaves the gradients uninitialised (NaN possible), and
        # the backward of where() cuts them off before they reach the context's projections.
        real = context.mask[:, None, :, None]
        narrow = (0, width - context.key.shape[-1])
        key = torch.cat([torch.where(real, F.pad(context.key, narrow), 0), key], dim=2)
        value = torch.cat([torch.where(real, F.pad(context.value, narrow), 0), value], dim=2)
        is_real = F.pad(context.mask, (0, n), value=True)
        order = torch.argsort(is_real.flatten().logical_not(), stable=True)
        lengths = is_real.sum(dim=1, dtype=torch.int32)
        cu_seqlens_k = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    else:
        order = None
        cu_seqlens_k = torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=query.device)
    key, value = (rearrange(x, "b g t w -> (b t) g w") for x in (key, value))
    if order is not None:
        key, value = key[order], value[order]
    return {
        "q": rearrange(query, "b h n w -> (b n) h w"),
        "k": key.contiguous(),
        "v": value.contiguous(),
        "cu_seqlens_q": torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=query.device),
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": n,
        "max_seqlen_k": s + n,
        "causal": causal,
    }
