"""Carries out what the watchdog decides: the edge between it and the workers of Ray Train, in their controller."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from shoal.train.loss import LossReport, OnLoss
from shoal.train.stacks import dump, dump_by_signal, place_of, stack_of
from shoal.train.stall import OnStall, StallReport
from shoal.train.watchdog import Stall, Watchdog, Why

logger = logging.getLogger(__name__)

_STACK_S = 1.0
"""How long a worker may take to say where it stands; the controller waits for it."""

_MAX_STACK = 20_000
"""Characters of stacks in a report; the logs have all."""


class Watch:
    """Carries out what the watchdog decides: looks where a worker stands, says so, and has it replaced.

    Says of workers that died, too.

    Lives as long as the controller, over all groups.
    """

    def __init__(
        self, on_stall: OnStall | None, has_restart: Callable[[], bool], on_loss: OnLoss | None = None
    ) -> None:
        self.watchdog = Watchdog()
        self._on_stall = on_stall
        self._on_loss = on_loss
        self._has_restart = has_restart

    def look(self, statuses: list[Any]) -> None:
        """Take in the answers of one poll. Of a worker that did not answer yet Ray makes one up, without a pulse."""
        answers = {
            rank: getattr(status, "pulse", None)
            for rank, status in enumerate(statuses)
            if status.error is None
        }
        self.watchdog.look(answers, time.monotonic())

    def tell_of(self, lost: Mapping[int, Exception]) -> None:
        """Say which workers were just lost, and why by rank."""
        if not lost or self._on_loss is None:
            return
        report = LossReport(
            ranks=sorted(lost),
            step=self.watchdog.steps_done,
            why="; ".join(dict.fromkeys(type(error).__name__ for error in lost.values())),
        )
        try:
            self._on_loss(report)
        except Exception:  # whatever it is, the workers are gone all the same
            logger.exception("could not record that workers were lost: %s", report)

    def act(self, workers: list[Any]) -> None:
        """End the worker that hangs, if one does: its group then fails as at any death.

        Blocks for `_STACK_S` at most, if none does for no time.
        """
        stall = self.watchdog.judge()
        if stall is None:
            return
        is_replaced = self._has_restart()
        stacks = _stacks_of(stall, workers)
        report = _report(stall, workers, stacks, is_replaced=is_replaced)
        logger.warning("%s", report)
        if self._on_stall is not None:
            try:
                self._on_stall(report)
            except Exception:  # a full disk, say: whatever it is, the worker hangs all the same
                logger.exception("could not record that a worker hangs: %s", report)
        if is_replaced:
            ray.kill(workers[stall.victim].actor)


def _stacks_of(stall: Stall, workers: list[Any]) -> dict[int, str]:
    """The stack of each rank's training thread as far as it can be had within `_STACK_S`, else why not."""
    if stall.why is Why.SILENT:
        (rank,) = stall.ranks
        where = workers[rank].metadata
        if where.node_id != ray.get_runtime_context().get_node_id():
            return {
                rank: f"(no stack: the process is on {where.hostname}, another machine than its controller's)"
            }
        found = {rank: dump_by_signal(where.pid, timeout_s=_STACK_S)}
    else:
        asked = {workers[rank].execute_async(dump): rank for rank in stall.ranks}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_STACK_S)
        found = {asked[ref]: _text(ref) for ref in done}
    return {
        rank: stack_of(text, stall.pulses[rank].thread if rank in stall.pulses else 0)
        if (text := found.get(rank))
        else "(no stack: the process did not react)"
        for rank in stall.ranks
    }


def _text(answer: Any) -> str:
    try:
        return str(ray.get(answer))
    except RayError:  # it died just now
        return ""


def _report(stall: Stall, workers: list[Any], stacks: dict[int, str], *, is_replaced: bool) -> StallReport:
    length = _MAX_STACK // len(stall.ranks)
    return StallReport(
        ranks=list(stall.ranks),
        pids=[workers[rank].metadata.pid for rank in stall.ranks],
        step=stall.steps,
        phase=stall.phase,
        seconds=round(stall.seconds, 1),
        why=stall.why.value,
        places=[place_of(stacks[rank]) for rank in stall.ranks],
        stack="\n\n".join(f"rank {rank}: {stacks[rank][:length]}" for rank in stall.ranks),
        replaced=is_replaced,
    )
