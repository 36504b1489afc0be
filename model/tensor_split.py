"""Which parameters tensor-parallel ranks split, and how (Megatron-LM, arXiv 1909.08053, section 3).

In the generation layers and the VLM's decoder layers, the projections to heads and to the MLP's hidden units are cut by rows of
the weight: each rank computes some heads and units. The projections back are cut by columns: the ranks' outputs add up.
The gate of the residual maps has one row per head and is split with the heads. Everything else is replicated on every rank; what
is replicated but applied to heads (norms of queries and keys) gets a part of its gradient on each.
"""

import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from latte_flow.model.backbone import BACKBONES, HEAD_NORMS, Backbone
from latte_flow.model.errors import ArgumentError

ROUNDING = 0.1
"""Largest accepted difference between replicas, relative to the tensor's largest absolute value. Optimizer moments differ most:
they average bfloat16 gradients that are larger than themselves. Different tensors differ by more than 1."""


def split_by_rows() -> str:
    """Return what the names of parameters cut by rows match, from their beginning to their end."""
    return rf"layers\.\d+\.residual_gate\.weight|{_names(lambda backbone: backbone.split_by_rows)}\.(?:weight|bias)"


def split_by_columns() -> str:
    """Return what the names of parameters cut by columns match."""
    return rf"{_names(lambda backbone: backbone.split_by_columns)}\.weight"


def is_applied_to_heads(name: str) -> bool:
    """Return whether a replicated parameter is applied to a rank's own heads: its gradients are to be added up over the ranks."""
    norms = _names(lambda backbone: [name for name in HEAD_NORMS if name in backbone.submodules])
    return re.fullmatch(rf"{norms}\.weight", name) is not None


def _names(parts: Callable[[Backbone], Iterable[str]]) -> str:
    """Return a pattern of the names that parts of a layer have in a LatteFlowModel and in the VLMs of all families."""
    names: dict[str, None] = {}
    for backbone in BACKBONES.values():
        vlm_layer = rf"(?:vlm\.)?{re.escape(backbone.layers)}\.\d+\."
        for part in parts(backbone):
            names[rf"layers\.\d+\.{re.escape(part)}"] = names[vlm_layer + re.escape(backbone.path(part))] = None
    return f"(?:{'|'.join(names)})"


def partition_dim(name: str) -> int | None:
    """Return the dimension along which tensor-parallel ranks hold equal, consecutive parts; None when each holds the whole.

    Args:
        name: of a parameter in the state dict of a LatteFlowModel or of its VLM.
    """
    if re.fullmatch(split_by_rows(), name):
        return 0
    return 1 if re.fullmatch(split_by_columns(), name) else None


def take_part(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """Return a rank's part of a parameter, a view.

    Raises:
        ArgumentError: when ``size`` does not divide it.
    """
    dim = partition_dim(name)
    if dim is None:
        return tensor
    if tensor.shape[dim] % size:
        raise ArgumentError(f"tensor_parallel: {size} does not divide dimension {dim} of {name}, {list(tensor.shape)}")
    return tensor.chunk(size, dim)[rank]


def whole_shape(name: str, part: Sequence[int], size: int) -> torch.Size:
    """Return the whole shape of a parameter from the shape of one rank's part; ``size`` ranks hold a part each."""
    dim = partition_dim(name)
    return torch.Size(n * (size if index == dim else 1) for index, n in enumerate(part))


def join_parts(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Return a whole parameter from the parts of ranks 0, 1, ...; of a replicated one, rank 0's copy.

    Raises:
        ArgumentError: when parts that should be the same differ by more than rounding.
    """
    dim = partition_dim(name)
    if dim is not None:
        return torch.cat(list(parts), dim)
    first = parts[0]
    for part in parts[1:]:
        # Each part's gradient is summed over data-parallel ranks of its own, on GPUs in an order that need not be the same.
        if not torch.equal(part, first) and not (part - first).abs().max() <= ROUNDING * first.abs().max():
            raise ArgumentError(f"{name}: differs between tensor-parallel ranks that should all hold the same")
    return first


def check_tensor_parallel(text_config, size: int) -> None:
    """Check that a number of tensor-parallel ranks can split the layers of a language model.

    Raises:
        ArgumentError: if not; the message names what it does not divide, and what is accepted.
    """
    numbers = {
        name: getattr(text_config, name) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    if size < 1 or any(number % size for number in numbers.values()):
        limit = min(numbers.values())
        accepted = [n for n in range(1, limit + 1) if not any(number % n for number in numbers.values())]
        shapes = ", ".join(f"{name} {number}" for name, number in numbers.items())
        raise ArgumentError(
            f"tensor_parallel: {size} does not divide {shapes}; accepted: {', '.join(map(str, accepted))}"
        )
