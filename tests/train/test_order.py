from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shoal.train.order import DataOrder

sizes = st.integers(1, 40)


@given(num_samples=sizes, batch_size=sizes, seed=st.integers(0, 9), epochs=st.integers(1, 3))
def test_every_sample_of_every_epoch_is_used_exactly_once(
    num_samples: int, batch_size: int, seed: int, epochs: int
) -> None:
    order = DataOrder(num_samples, batch_size, seed)
    steps = -(-num_samples * epochs // batch_size)
    pairs = [pair for batch in order.batches(range(steps), range(1), 1) for pair in batch]
    used = Counter(sample for position, sample in pairs if position < num_samples * epochs)
    assert used == dict.fromkeys(range(num_samples), epochs)


@given(batch_size=sizes, workers=st.integers(1, 8), first=st.integers(0, 50))
def test_the_workers_shares_make_up_the_batch_whatever_their_number(
    batch_size: int, workers: int, first: int
) -> None:
    order = DataOrder(23, batch_size, seed=1)
    step = range(first, first + 1)
    alone = next(order.batches(step, range(1), 1))
    shares = list(order.batches(step, range(workers), workers))
    assert [pair for share in shares for pair in share] == alone
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_resumed_loader_draws_what_the_first_would_have() -> None:
    order = DataOrder(10, 4, seed=3)
    whole = list(order.batches(range(9), range(1), 1))
    assert list(order.batches(range(5, 9), range(1), 1)) == whole[5:]


def test_epochs_and_seeds_differ() -> None:
    order = DataOrder(50, 4, seed=3)
    assert order.epoch(0) != order.epoch(1)
    assert order.epoch(0) != DataOrder(50, 4, seed=4).epoch(0)
