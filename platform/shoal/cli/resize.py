"""``shoal resize``."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.command import WORK, command
from shoal.cli.console import say
from shoal.cli.project import running, storage


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    examples = (
        "shoal resize digits-1a2b3c4d 2",
        "shoal resize digits-1a2b3c4d 1..4",
    )
    command(app, panel=WORK, examples=examples)(resize)


def resize(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A run that is being trained.")],
    workers: Annotated[
        str, typer.Argument(metavar="N|N..M", help="Workers; of a range, as many as are free, now and later.")
    ],
) -> None:
    """Give a run another number of workers while it trains, wherever it was started.

    Fewer at once, more as soon as there is room: the run commits at a step boundary and goes on from it, so no step
    is lost. With a range it grows by itself when room becomes free. Batches and schedule stay what they were, and of
    an exact run the bits. Returns at once; `shoal runs NAME` shows it happen. A new start says its own number.
    """
    from shoal.train.run import find_run

    run = find_run(storage(), name)
    _attach()
    run.resize(workers)
    say(
        f"run {run.name}: {workers} workers are asked for, {run.workers or 'none'} there; see: shoal runs {run.name}"
    )


def _attach() -> None:
    """Where a cluster runs, so that a number which can never fit there is refused; without one a run cannot train."""
    info = running()
    if info is not None:
        from shoal.cluster import attach

        attach(info)
