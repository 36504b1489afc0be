"""The role of a rank: the part of the batch it trains, and the part of every layer it holds.

Without tensor parallelism each rank trains its own part of the batch with the whole network. With it, ``tensor_parallel``
consecutive ranks share one network and train the same part of the batch.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor, nn

from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.tensor_split import whole_shape
from latte_flow.training.errors import UserError

NUMBER = re.compile(r"\d{1,9}", re.ASCII)

# tensor_parallel.py is imported where it is used: megatron-core takes seconds to import, and most runs do not need it.


@dataclass(frozen=True)
class Ranks:
    """This rank's data-parallel and tensor-parallel position. Without tensor parallelism the methods change nothing.

    Attributes:
        data_rank: index of the part of the batch it trains.
        data_size: number of parts of the batch.
        tensor_rank: index of the part of split parameters it holds.
        tensor_size: number of those parts; 1 without tensor parallelism.
        data_group: the data-parallel group of this rank, whose ranks hold the same part of the network; None for all ranks.
        mpu: model parallel unit that provides the groups to DeepSpeed; None without tensor parallelism.
    """

    data_rank: int
    data_size: int
    tensor_rank: int = 0
    tensor_size: int = 1
    data_group: dist.ProcessGroup | None = None
    mpu: object | None = None

    def split_model(self, model: LatteFlowModel) -> None:
        """Reduce a network on the CPU, identical on all ranks, to this rank's part; parameter names do not change."""
        if self.tensor_size > 1:
            from latte_flow.training.distributed.tensor_parallel import split_model

            split_model(model)

    def split_frozen(self, vlm: nn.Module) -> nn.Module:
        """Return this rank's part of a frozen VLM; the VLM itself is not changed."""
        if self.tensor_size == 1:
            return vlm
        from latte_flow.training.distributed.tensor_parallel import split_frozen

        return split_frozen(vlm)

    def gather_heads(self, values: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Gather each rank's values of its own heads, [B, H / ranks], into all heads, [B, H], for every layer. Collective."""
        if self.tensor_size == 1:
            return values
        from latte_flow.training.distributed.tensor_parallel import gather_heads

        return gather_heads(values)

    def whole_size(self, name: str, parameter: Tensor) -> int:
        """Return the number of elements of a parameter over all its parts."""
        own = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves parameters empty
        return whole_shape(name, own, self.tensor_size).numel()


def launched_ranks(*more: str) -> tuple[int, int]:
    """Return this process's rank and the number of ranks that a launcher has set in the environment; (0, 1) without one.

    Args:
        more: other variables that are needed.

    Raises:
        UserError: when they are set in part or have no sensible value, as if left in the shell.
    """
    rank, world_size = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
    if rank is world_size is None:
        return 0, 1
    needed = ("RANK", "WORLD_SIZE", *more)
    given = {name: value for name in dict.fromkeys((*needed, "LOCAL_RANK")) if (value := os.environ.get(name))}
    missing = [name for name in needed if name not in given]
    wrong = [name for name, value in given.items() if name != "MASTER_ADDR" and not NUMBER.fullmatch(value)]
    if missing or wrong or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        reason = f"{', '.join(missing)} not set" if missing else f"{', '.join(wrong) or 'RANK'} out of range"
        shown = " ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"environment: {shown}, but {reason}; accepted: all as a launcher sets them, or none (unset RANK WORLD_SIZE)"
        )
    return int(given["RANK"]), int(given["WORLD_SIZE"])


def start_alone_without_launcher() -> None:
    """Set the environment variables of a one-rank launch, unless a launcher has set them.

    Raises:
        UserError: see ``launched_ranks``.
    """
    launched_ranks("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({name: os.environ.get(name, value) for name, value in alone.items()})


def data_parallel_size(tensor_parallel: int, world_size: int) -> int:
    """Return the number of data-parallel ranks.

    Raises:
        UserError: when ``tensor_parallel`` does not divide the number of ranks.
    """
    if world_size % tensor_parallel:
        accepted = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise UserError(
            f"tensor_parallel: {tensor_parallel} does not divide the {world_size} ranks; accepted: {accepted}"
        )
    return world_size // tensor_parallel


def arrange_ranks(tensor_parallel: int, patience: timedelta) -> Ranks:
    """Create the process groups and return this rank's position. Collective.

    Args:
        tensor_parallel: number of ranks that share one network.
        patience: timeout of the groups' collectives.

    Raises:
        UserError: when ``tensor_parallel`` does not divide the number of ranks.
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
