"""A stand-in for the package flash-attn, which has no CPU build."""

import importlib.machinery
import math
import sys
import types

import pytest
import torch

from latte_flow.model import attention


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal):
    """Softmax attention of each packed sequence and head in float64, as flash-attn's docstring describes it."""
    heads, kv_heads = q.shape[1], k.shape[1]
    sequences = []
    for i in range(len(cu_seqlens_q) - 1):
        query = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].double()
        key = k[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].double()
        value = v[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].double()
        outputs = []
        for h in range(heads):
            g = h // (heads // kv_heads)  # "head 0, 1, 2 of Q will attention to head 0 of K, V"
            scores = scale * query[:, h] @ key[:, g].T
            # "aligned to the bottom right corner"; "if the row of the mask is all zero, the output will be zero"
            if causal:
                row, column = torch.arange(len(query))[:, None], torch.arange(len(key))[None, :]
                visible = column <= row + len(key) - len(query)
            else:
                visible = torch.ones_like(scores, dtype=torch.bool)
            top = scores.detach().masked_fill(~visible, -1e300).amax(dim=1, keepdim=True)
            weights = torch.where(visible, (scores - top).exp(), 0)
            total = weights.sum(dim=1, keepdim=True)
            outputs.append(weights / torch.where(total == 0, 1, total) @ value[:, g])
        sequences.append(torch.stack(outputs, dim=1))
    return torch.cat(sequences).to(q.dtype)


class VarlenAttention(torch.autograd.Function):
    """The stand-in's kernel, with NaN in the key/value gradients behind the last sequence.

    There the real backward writes nothing: it allocates dk and dv with ``torch.empty_like`` and fills what cu_seqlens_k
    spans.
    """

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal):
        ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)
        ctx.scale, ctx.causal = scale, causal
        return varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal)

    @staticmethod
    def backward(ctx, grad_output):
        *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        q, k, v = (x.detach().requires_grad_() for x in tensors)
        with torch.enable_grad():
            output = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.scale, ctx.causal)
        grad_q, grad_k, grad_v = torch.autograd.grad(output, (q, k, v), grad_output)
        grad_k[cu_seqlens_k[-1] :] = math.nan
        grad_v[cu_seqlens_k[-1] :] = math.nan
        return grad_q, grad_k, grad_v, None, None, None, None


class FlashAttnStandIn(types.ModuleType):
    """Module ``flash_attn``; ``calls`` keeps the positional and keyword arguments of every call."""

    def __init__(self):
        super().__init__("flash_attn")
        self.__spec__ = importlib.machinery.ModuleSpec("flash_attn", loader=None)
        self.calls = []

    def flash_attn_varlen_func(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self._attend(*args, **kwargs)

    @staticmethod
    def _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):  # fmt: skip
        # What the real kernel checks or silently relies on.
        assert q.dtype == k.dtype == v.dtype
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q[-1] == len(q)
        assert cu_seqlens_k[-1] <= len(k)
        assert cu_seqlens_q.diff().max() <= max_seqlen_q
        assert cu_seqlens_k.diff().max() <= max_seqlen_k
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return VarlenAttention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal)


@pytest.fixture
def flash_attn(monkeypatch):
    """Install the stand-in as the module ``flash_attn`` and return it."""
    module = FlashAttnStandIn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    # The kernel itself takes half precision on CUDA alone.
    monkeypatch.setattr(attention, "_flash_takes", lambda query: True)
    return module
