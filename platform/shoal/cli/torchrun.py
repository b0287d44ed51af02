"""Train under ``torchrun``, without Ray: its processes are the workers, the run is in the project's storage."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from shoal.cli.console import say
from shoal.cli.project import project_here
from shoal.errors import NotFoundError, RequestError, ShoalError

if TYPE_CHECKING:
    from shoal.recipe import Recipe
    from shoal.storage import Storage
    from shoal.tracking import ResolvedModel, RunRecord
    from shoal.train.group import Group
    from shoal.train.options import RunOptions
    from shoal.train.spec import RunSpec


def is_torchrun() -> bool:
    """Whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def train_under_torchrun(recipe: Recipe, options: RunOptions) -> None:
    """This process's part of the run; rank 0 shows progress and the result.

    Ctrl-C and SIGTERM commit a checkpoint and stop.

    Raises:
        RequestError: the run cannot be as asked. NotFoundError: no such version to start from.
        RecipeError, EnvironmentFailure, InternalError: it failed; the kind that was recorded.
    """
    from shoal.train.group import torchrun_group

    if options.workers is not None:
        raise RequestError("torchrun decides on the workers: leave --workers out, give it --nproc-per-node")
    spec = _spec(recipe, options)
    with torchrun_group() as group:
        finished = _agree(spec, group)
        if finished:
            if group.is_first:
                say(finished)
            return
        _train(spec, group)


def _spec(recipe: Recipe, options: RunOptions) -> RunSpec:
    from shoal.config import load
    from shoal.storage import Storage
    from shoal.train.options import plan_run

    config, project = load(), project_here()
    storage = Storage(config.storage_path(project))
    init_from = None if options.init_from is None else _version(storage, options.init_from)
    return plan_run(recipe, options, config, storage, project=project, init_from=init_from)


def _version(storage: Storage, text: str) -> ResolvedModel:
    """The version ``digits@1``, found on storage; aliases are the registry's, which needs a cluster."""
    from shoal.tracking import ResolvedModel
    from shoal.tracking.registry import parse_spec

    model, selector = parse_spec(text)
    if selector is None or not selector.isdecimal():
        raise RequestError(f"--init-from {text}: without a cluster, name a version by number, as {model}@1")
    resolved = ResolvedModel(model=model, version=int(selector), path=storage.model_dir(model, int(selector)))
    if not resolved.path.is_dir():
        raise NotFoundError(f"--init-from {text}: there is no {resolved.path}; see what is in its folder")
    return resolved


def _agree(spec: RunSpec, group: Group) -> str:
    """Rank 0 checks for all whether the run may start; returns a note if it is finished already."""
    from shoal.cli.failures import exit_code_of
    from shoal.train.driver import finished_run, prepare

    note, problem = "", None
    if group.is_first:
        try:
            record = prepare(spec)
            run = finished_run(spec, record)
            note = run.note if run is not None else ""
            record.clear_stop()
        except ShoalError as err:
            problem = err
    agreed: tuple[str, ShoalError | None] = group.share((note, problem))
    note, problem = agreed
    if problem is not None:
        if group.is_first:
            raise problem
        raise SystemExit(exit_code_of(problem))  # rank 0 says why
    return note


def _train(spec: RunSpec, group: Group) -> None:
    from shoal.cli.failures import exit_code_of
    from shoal.cli.runs import show_result
    from shoal.tracking import RunRecord
    from shoal.train.engine import train_worker
    from shoal.train.run import Run

    record = RunRecord(spec.storage, spec.name)
    with _stop_on_signals(record), _progress(record, shown=group.is_first):
        train_worker(spec, group)
    try:
        run = Run(record).wait(progress=False)  # it has ended; this raises why it failed
    except ShoalError as err:
        if group.is_first:
            raise
        raise SystemExit(exit_code_of(err)) from None  # rank 0 says why
    if group.is_first:
        show_result(run)


@contextmanager
def _stop_on_signals(record: RunRecord) -> Iterator[None]:
    """Ask the run to commit and stop when torchrun passes on SIGINT or SIGTERM."""

    def stop(signum: int, frame: FrameType | None) -> None:
        record.mark_stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(record: RunRecord, *, shown: bool) -> Iterator[None]:
    """Show progress from a thread: the main one trains."""
    from shoal.train.progress import reporter
    from shoal.train.run import Run, outcome_text

    over, since = threading.Event(), record.end_offset

    def watch() -> None:
        with reporter(
            record, enabled=True, last_line=lambda: outcome_text(Run(record)), since=since
        ) as report:
            while not over.wait(0.2):
                report.update()

    thread = threading.Thread(target=watch, name="shoal-progress", daemon=True)
    if shown:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if shown:
            thread.join()
