"""The ``shoal`` command: one file per topic, put together here.

Kept light: at the top, modules here import typer, each other, `shoal.errors` and `shoal.recipe`; everything else
inside the commands. A test measures ``shoal --help``.
"""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli import (
    apps,
    check,
    doctor,
    init,
    lifecycle,
    logs,
    models,
    resize,
    runs,
    status,
    stop,
    train,
    tune,
    ui,
)
from shoal.cli.command import make_app

app = make_app(
    "shoal",
    "One Ray cluster, one AI platform: train, tune, register and serve from one cluster.yaml.\n\n"
    "Begin with [bold]shoal up[/bold], then [bold]shoal train jobs.digits[/bold]; "
    "[bold]shoal COMMAND --help[/bold] has examples.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from shoal import __version__

        print(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command as a whole."""


for topic in (
    init,
    lifecycle,
    status,
    check,
    doctor,
    train,
    tune,
    runs,
    logs,
    resize,
    stop,
    ui,
    models,
    apps,
):
    topic.add_to(app)
