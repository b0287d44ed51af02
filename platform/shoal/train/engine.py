"""One worker's part of one attempt at a run, from its first line in the record to its last. No Ray here."""

from __future__ import annotations

import logging
import os
import socket
import time
import traceback
from contextlib import nullcontext

import torch

from shoal.errors import DeadlineExceeded, EnvironmentFailure, PeerLost, RecipeError
from shoal.storage import FileLock, Token
from shoal.tracking import RunRecord, RunState, being_trained
from shoal.train.bad_steps import BeginAgain
from shoal.train.boundary import RunBoundary
from shoal.train.group import Group, transport_errors
from shoal.train.loader import build_data
from shoal.train.out_of_memory import StepGivenUp, is_out_of_memory, read_micro_batch
from shoal.train.patient_record import PatientRecord
from shoal.train.pulse import heart
from shoal.train.resume import check_data, restore, warn_of_changed_code
from shoal.train.session import Session
from shoal.train.spec import EvalListener, RunSpec
from shoal.train.stamp import newest_token

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 20.0
"""How long a new rank 0 waits for the one before it to be gone for certain."""


def train_worker(spec: RunSpec, group: Group, *, on_eval: EvalListener | None = None) -> None:
    """Take this worker's part in the run until it ends, or is to go on with another number of workers. Blocks.

    Whatever the recipe raises ends the run: it is recorded and *not* raised, because raising is how a worker
    asks to be started again. The record's last line tells how it ended.

    Raises:
        RequestError: the run is being trained already.
        SupersededError: somebody else has taken over the run; nothing more is written to its record.
        EnvironmentFailure: the machines failed (a lost peer, full storage); starting again may help.
    """
    record = PatientRecord(spec.storage, spec.name)
    begin = record.end_offset
    with heart.attempt(), _HeldRun(record, group), record.reserving(is_mine=group.is_first):
        try:
            while _train(spec, group, record, on_eval):
                heart.begin_again()
        except PeerLost:
            group.leave()
            if not _has_ended(record, begin):
                raise  # else the peer left because the run is over, done or failed, and has said so
        except EnvironmentFailure:
            group.leave()
            raise
        except Exception as err:
            # BaseExceptions (Ray's SystemExit on kill) pass: they are not the recipe's.
            try:
                record.append_end(RunState.FAILED, step=record.step, failure=err, unknown=RecipeError)
            finally:
                group.leave()


def _train(spec: RunSpec, group: Group, record: PatientRecord, on_eval: EvalListener | None) -> bool:
    """True where all ranks are to begin anew, from what is committed by now."""
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    data = build_data(spec.recipe, spec.seed)
    token = _take_token(spec, group, record)
    record.guard_with(token.check)
    boundary = RunBoundary(spec, group, record, token, on_eval)
    session = Session(
        spec.recipe,
        data,
        group,
        boundary,
        seed=spec.seed,
        target_steps=spec.target_steps,
        precision=spec.precision,
        strategy=spec.strategy,
        shards=spec.shards,
        on_nan=spec.on_nan,
        micro_batch=group.share(_micro_batch(spec, record) if group.is_first else None),
    )
    check_data(record, data, group)
    beginning = restore(session, spec, record, token)
    boundary.begin(beginning)
    pids = group.gather(os.getpid())
    if group.is_first:
        warn_of_changed_code(record, spec)
        record.append(
            "start",
            workers=group.size,
            pids=pids,
            host=socket.gethostname(),
            step=session.steps_done,
            target_steps=spec.target_steps,
            source=beginning.source,
            revision=spec.revision,
        )
    try:
        # What a divided model sends to run a block is torch's affair, and so is how it fails.
        with transport_errors() if session.is_divided else nullcontext():
            boundary.catch_up(session, beginning)
            if not _loop(session, boundary):
                return True
            boundary.finish(session)
            return False
    except BeginAgain:
        token.check()  # the next token must not supersede somebody who has taken over
        return True
    except PeerLost:
        boundary.rescue(session)
        raise
    finally:
        session.close()
        boundary.close()


def _take_token(spec: RunSpec, group: Group, record: RunRecord) -> Token:
    """The attempt's right to write, which rank 0 takes for all: a survivor commits under it, too."""
    token: Token | None = None
    if group.is_first:
        token = record.fence.take(driver=spec.driver, above=newest_token(record.checkpoints_dir))
    token = group.share(token)
    assert token is not None
    return token


def _loop(session: Session, boundary: RunBoundary) -> bool:
    """Run the recipe's loop to its end; False where it did not fit into memory, and smaller parts of a batch may."""
    try:
        session.recipe.train(session)
    except StepGivenUp:
        boundary.out_of_memory(session, None)
        return False
    except Exception as err:
        if session.is_divided or not is_out_of_memory(err):
            raise  # the others wait within the model's own collectives, where nobody can tell them
        logger.warning("out of memory in step %d", session.steps_done, exc_info=True)
        traceback.clear_frames(err.__traceback__)  # they hold what did not fit
        boundary.out_of_memory(session, err)
        return False
    return True


def _micro_batch(spec: RunSpec, record: RunRecord) -> int | None:
    """The most samples at a time that were asked for and that are known to fit into memory; None for no limit."""
    if spec.shards is not None:
        return None  # an exact run's parts are its shards
    return min(filter(None, (spec.micro_batch, read_micro_batch(record.dir))), default=None)


class _HeldRun:
    """The run's lock, held by rank 0 while it trains; the others wait for it to be taken."""

    def __init__(self, record: RunRecord, group: Group) -> None:
        self._record, self._group = record, group
        self._lock = FileLock(record.lock_path)

    def __enter__(self) -> None:
        problem = None
        if self._group.is_first:
            try:
                self._lock.acquire(timeout_s=LOCK_TIMEOUT_S)
            except DeadlineExceeded as err:
                problem = being_trained(self._record.name, by=str(err))
        try:
            problem = self._group.share(problem)
        except BaseException:  # a peer is lost already; this process goes on, and must not lock itself out
            self._lock.release()
            raise
        if problem is not None:
            raise problem

    def __exit__(self, *exc: object) -> None:
        if self._group.is_first:
            self._lock.release()


def _has_ended(record: RunRecord, begin: int, *, timeout_s: float = 0.2) -> bool:
    """True if a worker has recorded the end of this attempt, for good or not.

    It does so before it leaves, which is what we noticed; a file system that shows it late may be a moment behind.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if record.events(("end", "resize"), since=begin):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
