"""``shoal stop``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.command import WORK, command
from shoal.cli.console import say
from shoal.cli.project import running, storage
from shoal.errors import DeadlineExceeded, NotFoundError, RequestError, did_you_mean

if TYPE_CHECKING:
    from shoal.storage import Storage
    from shoal.train.run import Run
    from shoal.tune import Sweep

DEADLINE_S = 120.0
"""Longer than a step and a commit; what goes on longer is said to go on."""
_POLL_S = 0.1


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, panel=WORK, examples=("shoal stop digits-1a2b3c4d",))(stop)


def stop(name: Annotated[str, typer.Argument(metavar="NAME", help="A run or a sweep.")]) -> None:
    """Ask a run or a sweep to commit and stop, wherever it was started, and wait until it has.

    The same command that started it goes on with it.
    """
    from shoal.tracking import RunRecord
    from shoal.train.run import find_run
    from shoal.tune import SweepRecord, open_sweep

    place = storage()
    if SweepRecord.exists(place, name):
        _stop_sweep(open_sweep(place, name))
    elif RunRecord.exists(place, name):
        _stop_run(place, find_run(place, name))
    else:
        _refuse(place, name)


def _stop_run(place: Storage, run: Run) -> None:
    from shoal.tune.record import pruned_runs, state_word

    if not run.is_active:
        state = state_word(run.record, pruned_runs(place))
        say(f"run {run.name} does not run: {state} at step {run.step:,}")
        return
    run.stop()
    _wait(lambda: not run.is_active, f"run {run.name} to stop")
    say(f"run {run.name}: {run.state} at step {run.step:,}; the command that started it goes on from there")


def _stop_sweep(sweep: Sweep) -> None:
    if not sweep.is_active:
        say(f"sweep {sweep.name} does not run")
        return
    sweep.stop()
    _wait(lambda: not sweep.is_active, f"sweep {sweep.name} to stop")
    say(f"sweep {sweep.name}: stopped; the command that started it goes on with it")


def _refuse(place: Storage, name: str) -> None:
    from shoal.serve import apps
    from shoal.tracking import list_runs
    from shoal.tune.record import sweep_names

    info = running()
    if info is not None and name in {app.name for app in apps(info)}:
        raise RequestError(f"{name!r} is an app; take it off the cluster with: shoal delete {name}")
    known = [*sweep_names(place), *(record.name for record in list_runs(place))]
    raise NotFoundError(
        f"there is no run and no sweep {name!r} in {place.root}; see: shoal runs{did_you_mean(name, known)}"
    )


def _wait(is_done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_done():
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"waited {DEADLINE_S:.0f} s for {what}; it was asked to, and will at its next step boundary"
            )
        time.sleep(_POLL_S)
