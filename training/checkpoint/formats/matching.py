"""Matches names in a file to names in a network: every weight exactly once, with the right shape."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from latte_flow.model.errors import ArgumentError
from latte_flow.training.checkpoint.formats.source import TensorInfo, TrainingState, WeightSource


def match_weights(model: nn.Module, tensors: Mapping[str, TensorInfo | Tensor]) -> dict[str, list[str]]:
    """Find each of a network's weights among the given names; tied weights have several names, of which one suffices.

    Args:
        model: the network; may be on the meta device.
        tensors: the available tensors.

    Returns:
        Name in the network -> its available names, one or more.

    Raises:
        ArgumentError: when a weight is missing, unknown or of another shape; the message names the first few.
    """
    own = model.state_dict(keep_vars=True)
    names_of: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names_of.setdefault(id(tensor), []).append(name)
    missing = [names[0] for names in names_of.values() if not any(name in tensors for name in names)]
    unknown = [name for name in tensors if name not in own]
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in tensors
        if name in own and tensors[name].shape != own[name].shape
    ]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong)):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ArgumentError(f"weights: {len(names)} {what}: {shown}; they do not belong to this network")
    return {names[0]: [name for name in names if name in tensors] for names in names_of.values()}


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor] | WeightSource, kind: str | None = None
) -> dict[str, str]:
    """Load weights into a network one at a time, every parameter exactly once. Return name in the network -> name that was read.

    Args:
        model: the network.
        weights: a state dict, or a source to read it from.
        kind: the kind of weights to read from a source; None for its first.

    Raises:
        ArgumentError: as ``match_weights``, before anything is loaded; or when a file is damaged.
    """
    own = model.state_dict(keep_vars=True)
    infos: Mapping = weights.tensors if isinstance(weights, WeightSource) else weights
    names = {name: there[0] for name, there in match_weights(model, infos).items()}
    with torch.no_grad():
        for name, there in names.items():
            own[name].copy_(weights.read(there, kind) if isinstance(weights, WeightSource) else weights[there])
    return names


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor with NaN or infinite elements. It is in memory already: nothing is read again."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()  # without a copy: a copy would double the memory of a conversion
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ArgumentError(
                f"{name}: holds NaN or infinite values as {str(tensor.dtype).removeprefix('torch.')}; accepted: finite values, "
                "as in an earlier checkpoint of the run, or a type with a larger range"
            )


class MatchedSource(WeightSource):
    """A view of a source under the names of a network: one name per weight, one kind, one dtype.

    Args:
        source: the source to read.
        model: the network it must match; may be on the meta device.
        kind: the kind of weights that ``read`` returns.
        dtype: dtype to cast floating-point weights to; None keeps theirs.

    Raises:
        ArgumentError: as ``match_weights``, or when weights that are tied in the network differ in the source; from ``read``, for
            NaN or infinite values.
    """

    def __init__(self, source: WeightSource, model: nn.Module, kind: str, dtype: torch.dtype | None = None):
        self.format, self.path, self.step, self.world_size = (
            source.format, source.path, source.step, source.world_size,
        )  # fmt: skip
        self.kinds = (kind,)
        self._source, self._dtype = source, dtype
        infos = source.tensors
        self._names = match_weights(model, infos)
        self._tensors = {name: self._describe(infos[there[0]]) for name, there in self._names.items()}
        for name, there in self._names.items():
            for other in there[1:]:
                if not torch.equal(source.read(there[0], kind), source.read(other, kind)):
                    raise ArgumentError(f"weights: {there[0]} and {other} differ, but {name} is tied in this network")

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def _read(self, name: str, kind: str) -> Tensor:
        tensor = self._source.read(self._names[name][0], kind)
        if tensor.shape != self._tensors[name].shape:
            raise ArgumentError(
                f"{self.path}: {name} is {list(tensor.shape)}, but was announced as {list(self._tensors[name].shape)}"
            )
        cast = tensor.to(self._cast(tensor.dtype))
        check_finite(f"{self.path}: {name} ({kind})", cast)
        return cast

    def keep_training_state(self) -> None:
        """Also expose the source's training state and all its kinds of tensors, for resuming training."""
        self.training_state: TrainingState | None = self._source.training_state
        self.kinds = self._source.kinds

    def _describe(self, info: TensorInfo) -> TensorInfo:
        return TensorInfo(info.shape, self._cast(info.dtype))

    def _cast(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype
