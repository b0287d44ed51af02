"""One order of addition, whoever holds the parts."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoal.errors import RecipeError
from shoal.train.buffers import Buffers
from shoal.train.exchange import TreeSum
from shoal.train.reduce import GradientBuckets, Wishes
from shoal.train.tree import Node, additions_of, combine, nodes_of, share_of

shard_counts = st.integers(1, 20)


def written_out(node: Node, num_shards: int) -> str:
    return "+".join(map(str, node.shards(num_shards)))


def expected(low: int, high: int) -> str:
    """The tree's sum of [low, high) by its definition: halve at the largest power of two below the length."""
    if high - low == 1:
        return str(low)
    middle = low + 2 ** ((high - low - 1).bit_length() - 1)
    return f"({expected(low, middle)}+{expected(middle, high)})"


@given(num_shards=shard_counts, num_workers=st.integers(1, 20))
def test_every_number_of_workers_adds_in_the_same_order(num_shards: int, num_workers: int) -> None:
    num_workers = min(num_workers, num_shards)
    held: dict[Node, str] = {}
    for rank in range(num_workers):
        shards = share_of(rank, num_workers, num_shards)
        buffer, saved = "", []
        for shard, num_additions in zip(shards, additions_of(shards, num_shards), strict=True):
            if buffer:
                saved.append(buffer)
            buffer = str(shard)
            for _ in range(num_additions):
                buffer = f"({saved.pop()}+{buffer})"
        held |= dict(zip(nodes_of(shards, num_shards), [*saved, buffer], strict=True))
    assert combine(held, num_shards, lambda a, b: f"({a}+{b})") == expected(0, num_shards)


def test_a_shard_that_nobody_holds_is_not_left_out() -> None:
    with pytest.raises(KeyError, match="no worker holds shard 1 of 2"):
        combine({Node(0, 0): 1.0}, 2, lambda a, b: a + b)


class ThreadGroup:
    """Ranks that are threads, with `Group`'s collectives over shared memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.shared: dict[Any, Any] = {}

    def rank(self, rank: int) -> Any:
        return _Rank(self, rank)


class _Rank:
    def __init__(self, whole: ThreadGroup, rank: int) -> None:
        self._whole, self.rank, self.size = whole, rank, whole.size
        self._calls = 0

    def _swap(self, mine: torch.Tensor) -> list[torch.Tensor]:
        self._calls += 1
        self._whole.shared[self._calls, self.rank] = mine.clone()
        self._whole.barrier.wait()
        return [self._whole.shared[self._calls, rank] for rank in range(self.size)]

    def start_sum(self, tensor: torch.Tensor) -> None:
        order = list(range(self.size))
        random.Random(self._calls).shuffle(order)  # a library's order is nobody's business
        everybody = self._swap(tensor)
        tensor.copy_(sum(everybody[rank] for rank in order[1:]) + everybody[order[0]])

    def start_exchange(
        self, received: torch.Tensor, sent: torch.Tensor, *, receives: list[int], sends: list[int]
    ) -> None:
        slices = [
            everybody.split(everybody.numel() // self.size)[self.rank] for everybody in self._swap(sent)
        ]
        assert [s.numel() for s in slices] == receives
        received.copy_(torch.cat(slices))

    def start_gather(self, whole: torch.Tensor, mine: torch.Tensor) -> None:
        whole.copy_(torch.cat(self._swap(mine)))

    def finish(self, work: None) -> None:
        pass


class Net(nn.Module):
    """Two parameters, one of which odd shards do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.zeros(5))
        self.sometimes = nn.Parameter(torch.zeros(3))


def summed(num_workers: int, num_shards: int, values: torch.Tensor) -> list[torch.Tensor]:
    """Per rank, gradients, riders and loss, as one vector; ``values`` are (shards, 9)."""
    group = ThreadGroup(num_workers)
    results: list[torch.Tensor] = [torch.empty(0)] * num_workers

    def work(rank: int) -> None:
        model = Net()
        shards = share_of(rank, num_workers, num_shards)
        exchange = TreeSum(group.rank(rank), num_shards)
        buckets = GradientBuckets(
            model.parameters(),
            additions_of(shards, num_shards),
            exchange,
            device=torch.device("cpu"),
            riders={torch.float32: 1},
        )
        for _ in range(2):  # the second step must not see the first
            for index, shard in enumerate(shards):
                buckets.begin(index)
                wishes = Wishes(checkpoint=shard == 0, resize=shard == num_shards - 1)
                buckets.set_control(values[shard, 0], wishes)
                buckets.rider[torch.float32].add_(values[shard, 8:])
                loss = model.used @ values[shard, :5]
                if shard % 2 == 0:
                    loss = loss + model.sometimes @ values[shard, 5:8]
                loss.backward()
                buckets.end()
            loss, wishes = buckets.finish()
        assert wishes == Wishes(checkpoint=True, resize=True), "what one wishes, all hear"
        results[rank] = torch.cat(
            [
                model.used.grad,  # type: ignore[list-item]
                model.sometimes.grad,  # type: ignore[list-item]
                buckets.rider[torch.float32],
                torch.tensor([loss]),
            ]
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 6, 8])
def test_the_sum_has_the_same_bits_on_any_number_of_workers(num_shards: int) -> None:
    generator = torch.Generator().manual_seed(num_shards)
    values = torch.randn(num_shards, 9, generator=generator) * 10.0 ** torch.randint(
        -6, 6, (num_shards, 9), generator=generator
    )
    leaves = values.clone()
    leaves[1::2, 5:8] = 0  # the parameter that odd shards do not use
    parts = {Node(0, shard): torch.cat([leaves[shard], leaves[shard, :1]]) for shard in range(num_shards)}
    whole = combine(parts, num_shards, torch.add)
    for num_workers in range(1, num_shards + 1):
        for result in summed(num_workers, num_shards, values):
            assert torch.equal(result, whole), f"{num_workers} workers"


def gradients_alone(num_shards: int, model: nn.Module, losses: list[Any], between: Any = None) -> Any:
    """What one worker that takes ``num_shards`` shards in a step has in the model's first parameter."""
    shards = range(num_shards)
    buckets = GradientBuckets(
        model.parameters(),
        additions_of(shards, num_shards),
        TreeSum(ThreadGroup(1).rank(0), num_shards),
        device=torch.device("cpu"),
    )
    for index, loss in enumerate(losses):
        buckets.begin(index)
        loss(model).backward()
        buckets.end()
        if between is not None:
            between(model)
    buckets.finish()
    buckets.close()
    return next(model.parameters()).grad.clone()  # type: ignore[union-attr]


def test_sparse_gradients_of_a_shard_are_grouped_with_no_other_shards() -> None:
    torch.manual_seed(0)
    scales = [10.0 ** torch.randint(-6, 6, (40,)) * torch.randn(40) for _ in range(2)]

    def loss_of(scale: torch.Tensor) -> Any:
        return lambda model: (model(torch.arange(40) % 3)[:, 0] * scale).sum()

    model = nn.Embedding(3, 1, sparse=True)
    left, right = (gradients_alone(1, model, [loss_of(scale)]) for scale in scales)
    both = gradients_alone(2, model, [loss_of(scale) for scale in scales])
    assert torch.equal(both, left + right)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_loop_that_empties_the_gradients_around_every_shard_loses_none(set_to_none: bool) -> None:
    model = Net()

    def loss(model: Any) -> torch.Tensor:
        model.zero_grad(set_to_none=set_to_none)  # a habit of many loops
        return model.used.sum()  # type: ignore[no-any-return]

    emptied = iter([True, False])  # not after the last: there the sum waits for the optimizer

    def between(model: Any) -> None:
        if next(emptied):
            model.zero_grad(set_to_none=set_to_none)

    assert gradients_alone(2, model, [loss, loss], between).tolist() == [2.0] * 5


def test_a_second_backward_pass_for_a_batch_is_refused() -> None:
    def loss(model: Any) -> torch.Tensor:
        model.used.sum().backward()
        return model.used.sum()  # type: ignore[no-any-return]

    with pytest.raises(RecipeError, match="got its gradient twice"):
        gradients_alone(2, Net(), [loss, loss])


def test_a_buffer_that_begins_infinite_becomes_what_was_measured() -> None:
    model = nn.Module()
    model.register_buffer("highest", torch.tensor([-torch.inf, -torch.inf, 1.0]))
    buffers = Buffers(model, 2)
    rider = {torch.float32: torch.zeros(3)}
    for index, value in enumerate((2.0, 4.0)):
        buffers.begin(index)
        model.highest[0] = value
        buffers.ride(rider, 0.5)
    buffers.land(rider)
    assert model.highest.tolist() == [3.0, -torch.inf, 1.0]
