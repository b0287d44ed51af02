"""The two ways a step is divided among workers and put together again: fast, or the same bits on any number."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from shoal.errors import RecipeError
from shoal.train.exchange import AllReduce, Exchange, TreeSum
from shoal.train.group import Group
from shoal.train.tree import Part, parts_of, shards_of


@dataclass(frozen=True)
class Scheme:
    """What one worker does of every step, and how the workers' results become one."""

    mine: range
    """This worker's share of the ``num_shards`` that a batch is divided into, in the order it takes them."""
    num_shards: int
    parts: tuple[Part, ...]
    exchange: Exchange


def fast(group: Group) -> Scheme:
    """One shard per worker, summed by the library: the same bits on the same number of workers."""
    whole = Part(joins=False, saves=False, num_additions=0)
    mine = range(group.rank, group.rank + 1)
    return Scheme(mine, group.size, (whole,), AllReduce(group))


def exact(model: nn.Module, group: Group, num_shards: int) -> Scheme:
    """A fixed number of virtual shards, summed in one fixed order: the same bits on any number of workers.

    Raises:
        RecipeError: there are more workers than shards, or the model is compiled (what a compiler fuses depends
            on the shapes it has seen).
    """
    from torch._dynamo import OptimizedModule

    if group.size > num_shards:
        raise RecipeError(
            f"exact: {num_shards} shards cannot be divided among {group.size} workers; ask for at most "
            f"{num_shards} workers, or start another run with shards={group.size} or more"
        )
    if any(isinstance(module, OptimizedModule) for module in model.modules()):
        raise RecipeError("exact: the model is compiled with torch.compile; take one of the two away")
    mine = shards_of(group.rank, group.size, num_shards)
    parts = parts_of(mine, num_shards)
    return Scheme(mine, num_shards, parts, TreeSum(group, num_shards))
