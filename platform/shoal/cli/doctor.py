"""``shoal doctor``."""

from __future__ import annotations

import typer

from shoal.cli.command import CLUSTER, command
from shoal.cli.console import say
from shoal.cli.project import project_here


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, panel=CLUSTER, examples=("shoal doctor",))(doctor)


def doctor() -> None:
    """Find what is wrong with the cluster or this machine, and say what to do about it.

    Changes nothing. Exits with 1 if it finds an error.
    """
    from shoal.cluster import doctor as look
    from shoal.config import load

    project, config = project_here(), load()
    findings = look(project, serve_port=config.serve.port, storage=config.storage_path(project))
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        say(f"{finding.level:<7}  {finding.subject.ljust(width)}  {finding.message}")
        if finding.next_step:
            say(f"{'':<7}  {'':<{width}}  -> {finding.next_step}")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
