from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from shoal.serve.core.batch import Batcher

EXECUTORS = [None, ThreadPoolExecutor(1)]


class Doubler:
    """Doubles its items and remembers the batches it saw."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        if 13 in items:
            raise ValueError("13")
        return [2 * item for item in items]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("wait_s", [0.0, 0.01])
def test_everyone_gets_their_own_answer_in_full_batches(executor: Executor | None, wait_s: float) -> None:
    double = Doubler()

    num_by_size: Counter[int] = Counter()

    async def main() -> list[int]:
        batcher = Batcher(double, max_size=4, max_wait_s=wait_s, executor=executor, num_by_size=num_by_size)
        return list(await asyncio.gather(*(batcher.submit(n) for n in range(10))))

    assert asyncio.run(main()) == [2 * n for n in range(10)]
    assert [len(batch) for batch in double.batches] == [4, 4, 2]
    assert [item for batch in double.batches for item in batch] == list(range(10)), "in order of arrival"
    assert num_by_size == {4: 2, 2: 1}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_item_that_fails_fails_nobody_else(executor: Executor | None) -> None:
    double = Doubler()

    async def main() -> list[object]:
        batcher = Batcher(double, max_size=3, executor=executor)
        return list(
            await asyncio.gather(*(batcher.submit(n) for n in (1, 13, 3, 4, 5)), return_exceptions=True)
        )

    answers = asyncio.run(main())
    assert isinstance(answers.pop(1), ValueError)
    assert answers == [2, 6, 8, 10]
    assert double.batches == [[1, 13, 3], [1], [13], [3], [4, 5]]


def test_an_executor_that_takes_no_more_is_told_to_all() -> None:
    closed = ThreadPoolExecutor(1)
    closed.shutdown()

    async def main() -> list[object]:
        batcher = Batcher(Doubler(), max_size=2, executor=closed)
        answers = asyncio.gather(*(batcher.submit(n) for n in range(3)), return_exceptions=True)
        return list(await asyncio.wait_for(answers, 20))

    assert all(isinstance(answer, RuntimeError) for answer in asyncio.run(main()))


def test_a_waiting_caller_who_leaves_is_not_computed() -> None:
    double = Doubler()

    async def main() -> int:
        batcher = Batcher(double, max_size=10, max_wait_s=0.02)
        leaver = asyncio.create_task(batcher.submit(1))
        stayer = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0)
        leaver.cancel()
        return await stayer

    assert asyncio.run(main()) == 4
    assert double.batches == [[2]]


def test_the_next_batch_gathers_while_one_runs() -> None:
    running, let_go = threading.Event(), threading.Event()
    double = Doubler()

    def slow(items: Sequence[int]) -> list[int]:
        running.set()
        assert let_go.wait(10)
        return double(items)

    async def main() -> None:
        batcher = Batcher(slow, max_size=8, executor=EXECUTORS[1])
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(running.wait, 10)
        others = [asyncio.create_task(batcher.submit(n)) for n in range(1, 6)]
        await asyncio.sleep(0)
        let_go.set()
        await asyncio.gather(first, *others)

    asyncio.run(main())
    assert double.batches == [[0], [1, 2, 3, 4, 5]]


def test_wrong_number_of_answers_is_an_error_for_all() -> None:
    async def main() -> list[object]:
        batcher: Batcher[int, int] = Batcher(lambda items: [0], max_size=4)
        return list(await asyncio.gather(*(batcher.submit(n) for n in range(2)), return_exceptions=True))

    assert all(isinstance(answer, RuntimeError) for answer in asyncio.run(main()))
