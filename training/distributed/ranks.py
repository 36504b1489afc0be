"""Where a rank stands: which part of the batch it trains, and which part of every layer it holds.

Without tensor parallelism each rank trains its own part of the batch with the whole network. With it, ``tensor_parallel``
consecutive ranks hold one network between them and train the same part of the batch.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor, nn

from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.partition import whole_shape
from latte_flow.training.errors import UserError

# tensor_parallel.py is imported where it is used: megatron-core takes seconds to import, and most runs do without.


@dataclass(frozen=True)
class Ranks:
    """This rank's place, and what it means for networks. Without tensor parallelism the methods change nothing.

    Attributes:
        data_rank: which part of the batch it trains.
        data_size: how many parts the batch has.
        tensor_rank: which part of the split parameters it holds.
        tensor_size: how many parts they have; 1 without tensor parallelism.
        data_group: the ranks that hold the same part as this one and train all parts of the batch; None for all ranks.
        mpu: what DeepSpeed asks for the groups; None without tensor parallelism.
    """

    data_rank: int
    data_size: int
    tensor_rank: int = 0
    tensor_size: int = 1
    data_group: dist.ProcessGroup | None = None
    mpu: object | None = None

    def split_model(self, model: LatteFlowModel) -> None:
        """Leave this rank its part of a network on the CPU that is the same on all ranks; names stay what they are."""
        if self.tensor_size > 1:
            from latte_flow.training.distributed.tensor_parallel import split_model

            split_model(model)

    def split_frozen(self, vlm: nn.Module) -> nn.Module:
        """Return this rank's part of a frozen VLM; the VLM stays whole."""
        if self.tensor_size == 1:
            return vlm
        from latte_flow.training.distributed.tensor_parallel import split_frozen

        return split_frozen(vlm)

    def gather_heads(self, values: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Return, for every layer, what each rank has of its own heads, [B, H / ranks], as a whole, [B, H]. Collective."""
        if self.tensor_size == 1:
            return values
        from latte_flow.training.distributed.tensor_parallel import gather_heads

        return gather_heads(values)

    def whole_size(self, name: str, parameter: Tensor) -> int:
        """Return how many numbers a parameter has over all its parts."""
        own = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves parameters empty
        return whole_shape(name, own, self.tensor_size).numel()


def start_alone_without_launcher() -> None:
    """Set the variables of a launch of one rank, where no launcher has set any."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({name: os.environ.get(name, value) for name, value in alone.items()})


def data_parallel_size(tensor_parallel: int, world_size: int) -> int:
    """Return how many parts the batch is cut into.

    Raises:
        UserError: when the ranks cannot be dealt into equal sets.
    """
    if world_size % tensor_parallel:
        accepted = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise UserError(
            f"tensor_parallel: {tensor_parallel} does not divide the {world_size} ranks; accepted: {accepted}"
        )
    return world_size // tensor_parallel


def arrange_ranks(tensor_parallel: int, patience: timedelta) -> Ranks:
    """Return this rank's place among all, and make the process groups for it. Collective.

    Args:
        tensor_parallel: how many ranks hold one network.
        patience: how long a collective of the groups may take.

    Raises:
        UserError: when that does not divide the number of ranks.
    """
    data_size = data_parallel_size(tensor_parallel, dist.get_world_size())
    if tensor_parallel == 1:
        return Ranks(dist.get_rank(), data_size)
    from latte_flow.training.distributed.tensor_parallel import ModelParallelUnit, initialize

    initialize(tensor_parallel, patience)
    mpu = ModelParallelUnit()
    return Ranks(
        data_rank=mpu.get_data_parallel_rank(),
        data_size=data_size,
        tensor_rank=mpu.get_model_parallel_rank(),
        tensor_size=tensor_parallel,
        data_group=mpu.get_data_parallel_group(),
        mpu=mpu,
    )
