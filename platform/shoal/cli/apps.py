"""``shoal serve``, ``shoal apps`` and ``shoal delete``."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.command import MODELS, command
from shoal.cli.console import say, show_facts, show_table
from shoal.cli.project import require_running


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    examples = (
        "shoal serve serve_apps.digits:app --model digits@champion",
        "shoal serve serve_apps.digits:app --model digits@3 --name digits-next",
    )
    command(app, panel=MODELS, examples=examples)(serve)
    command(app, panel=MODELS, examples=("shoal apps",))(apps)
    command(app, panel=MODELS, examples=("shoal delete digits",))(delete)


def serve(
    app: Annotated[str, typer.Argument(metavar="MODULE:APP", help="Such as serve_apps.digits:app.")],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="What it answers with: digits@champion, digits@3.")
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the app. Default: the module's last part.")
    ] = None,
) -> None:
    """Serve a model with an app, and wait until it answers.

    An app of this name that runs already takes the new version in place; no request is lost. Other apps stay.
    """
    from shoal.serve import deploy

    served = deploy(require_running(), app, model=model, name=name, say=say)
    show_facts(
        {
            "app": served.name,
            "model": served.model,
            "url": served.url,
            "try": served.curl(),
            "docs": f"{served.url}/docs",
        }
    )


def apps() -> None:
    """List the apps that run."""
    from shoal.serve import apps as list_apps

    found = [(app, app.status()) for app in list_apps(require_running())]
    if not found:
        say("no apps yet; start one: shoal serve MODULE:APP --model MODEL@ALIAS")
        return
    rows = [(app.name, status.state, app.model, status.replicas, app.url) for app, status in found]
    show_table(("app", "state", "model", "replicas", "url"), rows, numbers=("replicas",))
    for app, status in found:
        if status.message:
            say(f"{app.name}: {status.message}")


def delete(app: Annotated[str, typer.Argument(metavar="APP", help="Name of the app.")]) -> None:
    """Take an app off the cluster. Requests in flight are finished first."""
    from shoal.serve import delete as take_off

    take_off(require_running(), app, say=say)
    say(f"app {app} is deleted")
