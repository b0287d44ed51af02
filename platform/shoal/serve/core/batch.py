"""Requests that wait together run together: one forward for many."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items and runs them through ``forward`` in batches, one batch at a time, in order of arrival.

    A batch starts when it is full or when its first item has waited ``max_wait_s``. With a wait of 0 it
    starts at the end of the event loop's turn, so what arrived together runs together and nobody waits for
    company; while a batch runs on ``executor`` the next one gathers. Without an executor it runs in the event
    loop's thread: for a forward of less than a millisecond the switch to another thread and back costs more.
    Batches are counted in ``num_by_size``.

    `ray.serve.batch` does the same through a queue and tasks of its own: 22 microseconds per item against 2
    here, with 32 callers and an empty ``forward`` (2026-11-23).
    """

    def __init__(
        self,
        forward: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_size: int,
        max_wait_s: float = 0.0,
        executor: Executor | None = None,
        num_by_size: Counter[int] | None = None,
    ) -> None:
        self._forward = forward
        self._max_size = max_size
        self._max_wait_s = max_wait_s
        self.executor = executor
        self._num_by_size = Counter() if num_by_size is None else num_by_size
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._timer: asyncio.Handle | None = None
        self._is_due = False
        self._running: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """The result for ``item``.

        A caller that is cancelled while it waits leaves its batch. If ``forward`` raises, the items of that batch
        run again one by one, and a caller gets the exception if his does: one bad item fails nobody else's.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        if self._running is None:
            self._schedule(loop)
        return await future

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        is_due = not self._max_wait_s or len(self._waiting) >= self._max_size
        if is_due and not self._is_due:
            if self._timer is not None:
                self._timer.cancel()
            self._is_due = True
            self._timer = loop.call_soon(self._start)
        elif self._timer is None:
            self._timer = loop.call_later(self._max_wait_s, self._start)

    def _start(self) -> None:
        self._timer = None
        self._is_due = False
        batch = self._take()
        if not batch:
            return
        self._num_by_size[len(batch)] += 1
        if self.executor is None:
            self._run_here(batch)
            if self._waiting:
                self._schedule(asyncio.get_running_loop())
        else:
            self._running = asyncio.get_running_loop().create_task(self._run_on(self.executor, batch))

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        waiting = [entry for entry in self._waiting if not entry[1].done()]
        batch, self._waiting = waiting[: self._max_size], waiting[self._max_size :]
        return batch

    def _run_here(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        _hand_out(batch, self._outcomes([item for item, _ in batch]))

    async def _run_on(self, executor: Executor, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            outcomes = await loop.run_in_executor(executor, self._outcomes, [item for item, _ in batch])
        except Exception as error:  # the executor takes no more
            _hand_out(batch, [error] * len(batch))
        else:
            _hand_out(batch, outcomes)
        finally:
            self._running = None
            self._start()  # those who came meanwhile have waited long enough

    def _outcomes(self, items: Sequence[Item]) -> Sequence[Result | Exception]:
        """A result for each item, or why there is none."""
        try:
            results = self._forward(items)
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [outcome for item in items for outcome in self._outcomes([item])]
        if len(results) != len(items):  # no item's fault
            wrong = RuntimeError(f"the endpoint gave {len(results)} answers for a batch of {len(items)}")
            return [wrong] * len(items)
        return results


def _hand_out(
    batch: list[tuple[Item, asyncio.Future[Result]]], outcomes: Sequence[Result | Exception]
) -> None:
    for (_, future), outcome in zip(batch, outcomes, strict=True):
        if future.done():
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
