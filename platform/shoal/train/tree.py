"""The one order in which the parts of a sum are added, whoever holds them.

Floating-point addition depends on the order. Here the parts (virtual shards) 0, 1, ... are the leaves of one
fixed tree: neighbours are added first, then neighbours of those. A *node* is a complete subtree; each worker adds
up the largest nodes inside its own range of shards, and what is left of the tree is the same for any number of
workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """The sum of the shards ``[index * 2**level, (index + 1) * 2**level)``, those that exist."""

    level: int
    index: int

    def shards(self, num_shards: int) -> range:
        """The shards below it."""
        return range(
            min(self.index << self.level, num_shards), min((self.index + 1) << self.level, num_shards)
        )


def share_of(index: int, num_shares: int, length: int) -> range:
    """One of ``num_shares`` contiguous shares of ``range(length)``; their lengths differ by at most one."""
    return range(length * index // num_shares, length * (index + 1) // num_shares)


def additions_of(shards: range, num_shards: int) -> tuple[int, ...]:
    """For each of a worker's shards, how many sums that it has put aside, the latest first, are added to it.

    What comes of that is put aside in turn; after the last shard what is left are the worker's `nodes_of`.
    """
    nodes: tuple[Node, ...] = ()
    counts = []
    for shard in shards:
        nodes, num_additions = _push(nodes, shard, num_shards)
        counts.append(num_additions)
    return tuple(counts)


def nodes_of(shards: range, num_shards: int) -> tuple[Node, ...]:
    """The nodes that a worker is left with after all of its shards."""
    nodes: tuple[Node, ...] = ()
    for shard in shards:
        nodes, _ = _push(nodes, shard, num_shards)
    return nodes


def _push(nodes: tuple[Node, ...], shard: int, num_shards: int) -> tuple[tuple[Node, ...], int]:
    """Add the next shard to the nodes of those before it; how many additions that takes, too."""
    *rest, last = *nodes, Node(0, shard)
    num_additions = 0
    while last.shards(num_shards) != range(num_shards):
        if last.index % 2:
            if rest[-1:] != [Node(last.level, last.index - 1)]:
                break  # a right half, whose left half is somebody else's
            rest.pop()
            num_additions += 1
        elif Node(last.level, last.index + 1).shards(num_shards):
            break  # a left half, whose right half is yet to come
        last = Node(last.level + 1, last.index // 2)
    return (*rest, last), num_additions


def combine(parts: Mapping[Node, T], num_shards: int, add: Callable[[T, T], T]) -> T:
    """The sum over all shards from the nodes that the workers hold, in the tree's order.

    ``parts`` must cover every shard exactly once.
    """

    def total(node: Node) -> T:
        if node in parts:
            return parts[node]
        if not node.level:
            raise KeyError(f"no worker holds shard {node.index} of {num_shards}")
        left, right = (Node(node.level - 1, 2 * node.index + half) for half in (0, 1))
        return add(total(left), total(right)) if right.shards(num_shards) else total(left)

    return total(Node((num_shards - 1).bit_length(), 0))
