"""The distribution of an optimizer step's samples over ranks and micro-batches."""

from dataclasses import dataclass

from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.errors import UserError


@dataclass(frozen=True)
class BatchLayout:
    """The distribution of an optimizer step's samples over ranks and micro-batches.

    Micro-batch a of rank r in step s holds the samples s B + (a W + r) b + (0 .. b - 1), where B is the global batch size, W the
    number of ranks and b the micro-batch size. A step therefore trains the same samples for any W and b.
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    rank: int

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def indices(self, step: int, micro_step: int) -> range:
        """Return the global sample indices of one micro-batch on this rank."""
        first = step * self.global_batch_size + (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


def make_batch_layout(config: TrainingConfig, *, world_size: int, rank: int) -> BatchLayout:
    """Return the distribution of the global batch over ranks and micro-batches.

    Args:
        config: the run.
        world_size: number of data-parallel ranks (``Ranks.data_size``).
        rank: this rank's index among them.

    Raises:
        UserError: when global_batch_size is not accumulation x micro_batch_size x world size.
    """
    total, micro = config.global_batch_size, config.micro_batch_size
    ranks = f"{world_size} {'ranks' if config.tensor_parallel == 1 else 'data-parallel ranks'}"
    if micro is None:
        if total % world_size:
            raise UserError(f"global_batch_size: {total} is not a multiple of the {ranks}")
        micro = total // world_size
    if micro < 1 or total % (micro * world_size):
        raise UserError(
            f"micro_batch_size: {micro} on {ranks} does not divide global_batch_size {total}; accepted: divisors of "
            f"{total / world_size:g}"
        )
    return BatchLayout(global_batch_size=total, micro_batch_size=micro, world_size=world_size, rank=rank)
