"""``shoal up``, ``shoal down`` and ``shoal env``."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.command import CLUSTER, command
from shoal.cli.console import say, show_facts
from shoal.cli.options import Set, Target
from shoal.cli.project import project_here, require_running


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, panel=CLUSTER, examples=("shoal up", "shoal up --set serve.port=0"))(up)
    command(app, panel=CLUSTER, examples=("shoal down",))(down)
    command(
        app,
        panel=CLUSTER,
        examples=('eval "$(shoal env)"  # then: ray job submit, serve deploy, ray status',),
    )(env)


def up(target: Target = None, set_: Set = None) -> None:
    """Start the cluster that cluster.yaml describes, or find it running.

    It stays until `shoal down`. What a crash left of an earlier one is cleaned up first.
    """
    from shoal.api import bring_up
    from shoal.config import load, notes

    config = load(target=target, overrides=set_ or [])
    for note in notes(config):
        say(f"note: {note}")
    info = bring_up(config, project_here(), say=say)
    show_facts(
        {
            "dashboard": info.dashboard_url,
            "apps": info.serve_url,
            "storage": info.storage,
            "next": "shoal train MODULE    shoal status    shoal down",
        }
    )


def down() -> None:
    """Stop this project's cluster and every process it started. What was committed to storage stays."""
    from shoal.cluster import down as stop

    if not stop(project_here(), say=say):
        say("no cluster of this project runs")
    else:
        say("the cluster is down; runs and models are kept")


def env(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Print what `ray job submit`, `serve deploy` and `ray status` need to reach the cluster."""
    import json
    import shlex

    from shoal.cluster import environment

    values = environment(require_running())
    if as_json:
        say(json.dumps(values, indent=2))
        return
    for name, value in values.items():
        say(f"export {name}={shlex.quote(value)}")
