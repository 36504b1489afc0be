"""Joint attention with residual maps written out with loops in float64, to compare the backends with (paper Eq. 2-3).

A chain is what a group of layers computes: each layer has its own queries, keys, values and context, and takes the map
of the layer before it. Shapes: B batch, H query heads, G key/value heads, N image tokens, S context tokens, E head_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latte_flow.model.attention import AttentionSpec, ContextKeyValues, joint_attention


@dataclass
class Chain:
    """Inputs of consecutive layers: a dict of leaf tensors per layer, and which context tokens are real."""

    layers: list[dict[str, Tensor]]
    mask: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        return {f"layer {i} {name}": x for i, layer in enumerate(self.layers) for name, x in layer.items()}


def make_chain(
    *,
    depth: int = 3,
    batch: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 5,
    head_dim: int = 8,
    mask: Tensor | None = None,
    residual: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> Chain:
    """Return random inputs; ``mask`` [B, S] makes a context, every layer but the first has a gate."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    layers = []
    for i in range(depth):
        layer = {
            "query": 1.5 * draw(batch, heads, tokens, head_dim),
            "key": 1.5 * draw(batch, kv_heads, tokens, head_dim),
            "value": draw(batch, kv_heads, tokens, head_dim),
        }
        if mask is not None:
            layer["context key"] = 1.5 * draw(batch, kv_heads, mask.shape[1], head_dim)
            layer["context value"] = draw(batch, kv_heads, mask.shape[1], head_dim)
        if i and residual:
            layer["gate"] = draw(batch, heads).tanh()
        layers.append({name: x.to(device, dtype).requires_grad_() for name, x in layer.items()})
    return Chain(layers, None if mask is None else mask.to(device))


def run_model(chain: Chain, spec: AttentionSpec, causal: bool = False) -> list[Tensor]:
    """Return each layer's output [B, N, H * E] as the project computes it."""
    outputs, previous = [], None
    for layer in chain.layers:
        context = None
        if chain.mask is not None:
            context = ContextKeyValues(layer["context key"], layer["context value"], chain.mask)
        output, previous = joint_attention(
            layer["query"],
            layer["key"],
            layer["value"],
            spec=spec,
            context=context,
            previous=previous if "gate" in layer else None,
            gate=layer.get("gate"),
            causal=causal,
        )
        outputs.append(output)
    return outputs


def softmax(scores: Tensor) -> Tensor:
    """exp(s_j) / sum_k exp(s_k) over the last dimension."""
    exponentials = (scores - scores.detach().amax(dim=-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def run_oracle(chain: Chain, *, source: str = "raw", space: str = "logits", causal: bool = False) -> list[Tensor]:
    """Return each layer's output [B, N, H * E] in float64: one sample and one head at a time, padding left out."""
    batch, heads, tokens, head_dim = chain.layers[0]["query"].shape
    kv_heads = chain.layers[0]["key"].shape[1]
    outputs = [[[None] * heads for _ in range(batch)] for _ in chain.layers]
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            handed_on = None
            for i, layer in enumerate(chain.layers):
                query, key, value = layer["query"][b, h], layer["key"][b, g], layer["value"][b, g]
                query, key, value = query.double(), key.double(), value.double()
                image = torch.einsum("ne,me->nm", query, key) / head_dim**0.5
                context = image[:, :0]
                values = value
                if chain.mask is not None:
                    real = chain.mask[b].nonzero().flatten()
                    context_key, context_value = layer["context key"][b, g][real], layer["context value"][b, g][real]
                    context = torch.einsum("ne,se->ns", query, context_key.double()) / head_dim**0.5
                    values = torch.cat([context_value.double(), value])
                gate = layer["gate"][b, h].double() if "gate" in layer else None

                own = augmented = image
                if space == "logits" and gate is not None:
                    augmented = image + gate * handed_on
                visible = augmented
                if causal:
                    above = torch.tensor([[m > n for m in range(tokens)] for n in range(tokens)], device=image.device)
                    visible = augmented.masked_fill(above, -torch.inf)
                weights = softmax(torch.cat([context, visible], dim=-1))
                if space == "probabilities":
                    own = augmented = weights[:, context.shape[1] :]
                    if gate is not None:
                        augmented = own + gate * handed_on
                        weights = torch.cat([weights[:, : context.shape[1]], augmented], dim=-1)
                outputs[i][b][h] = weights @ values
                handed_on = own if source == "raw" else augmented
    return [torch.stack([torch.cat(per_head, dim=-1) for per_head in layer]) for layer in outputs]


def gradients(outputs: list[Tensor], chain: Chain, seed: int = 1) -> dict[str, Tensor]:
    """Return the gradient of a random linear function of all outputs with respect to every leaf of the chain."""
    rng = torch.Generator().manual_seed(seed)
    total = 0
    for output in outputs:
        weights = torch.randn(output.shape, generator=rng, dtype=torch.float64).to(output.device)
        total = total + (output.double() * weights).sum()
    leaves = chain.leaves()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), materialize_grads=True), strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in the Euclidean norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
