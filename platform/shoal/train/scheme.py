"""The two ways a step is divided among workers and put together again: fast, or the same bits on any number."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from shoal.errors import RecipeError
from shoal.train.exchange import AllReduce, Exchange, TreeSum
from shoal.train.group import Group
from shoal.train.tree import additions_of, share_of


@dataclass(frozen=True)
class Scheme:
    """What one worker does of every step, and how the workers' results become one."""

    mine: range
    """This worker's share of the ``num_shards`` that a batch is divided into, in the order it takes them."""
    num_shards: int
    additions: tuple[int, ...]
    """Of each of them, see `tree.additions_of`."""
    exchange: Exchange


def fast(group: Group, parts: int = 1) -> Scheme:
    """Of each worker ``parts`` shards, which it adds up as they come; summed over workers by the library.

    The same bits on the same number of workers, with the same number of parts.
    """
    mine = range(group.rank * parts, (group.rank + 1) * parts)
    return Scheme(mine, group.size * parts, (0, *[1] * (parts - 1)), AllReduce(group))


def exact(model: nn.Module, group: Group, num_shards: int) -> Scheme:
    """A fixed number of virtual shards, summed in one fixed order: the same bits on any number of workers.

    Raises:
        RecipeError: there are more workers than shards, batches are normalised over workers (`nn.SyncBatchNorm`,
            whose workers wait for each other in every shard), or the model is compiled (what a compiler fuses depends
            on the shapes it has seen).
    """
    from torch._dynamo import OptimizedModule

    if group.size > num_shards:
        raise RecipeError(
            f"exact: {num_shards} shards cannot be divided among {group.size} workers; ask for at most "
            f"{num_shards} workers, or start another run with shards={group.size} or more"
        )
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise RecipeError(
            "exact: nn.SyncBatchNorm depends on the number of workers; take nn.BatchNorm instead"
        )
    if any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules()):
        raise RecipeError("exact: the model is compiled with torch.compile; take one of the two away")
    mine = share_of(group.rank, group.size, num_shards)
    return Scheme(mine, num_shards, additions_of(mine, num_shards), TreeSum(group, num_shards))
