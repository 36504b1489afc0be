"""Collectives over Python objects: all ranks of a group must call them in the same order."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_first_rank() -> bool:
    """Return whether this is rank 0, which writes and prints for all."""
    return dist.get_rank() == 0


def print_once(message: str) -> None:
    """Print a message on rank 0 only, unbuffered. Not collective."""
    if is_first_rank():
        print(message, flush=True)


def share(items: list[T]) -> list[T]:
    """Return this rank's share of a list: every world_size-th item. Not collective."""
    return items[dist.get_rank() :: dist.get_world_size()]


def agree(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Return rank 0's value on all ranks, for example its view of the file system."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks of a group, in rank order."""
    parts: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, value, group)
    return parts
