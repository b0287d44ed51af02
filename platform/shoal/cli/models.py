"""``shoal models``, ``shoal register`` and ``shoal alias``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.command import MODELS, command
from shoal.cli.console import age_text, say, show_facts, show_table
from shoal.cli.project import connect

if TYPE_CHECKING:
    from shoal.api import Cluster


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, panel=MODELS, examples=("shoal models", "shoal models digits"))(models)
    command(
        app,
        panel=MODELS,
        examples=(
            "shoal register digits digits-1a2b3c4d --alias champion",
            "shoal register digits digits-sweep-1a2b3c4d",
        ),
    )(register)
    command(app, panel=MODELS, examples=("shoal alias digits champion 3",))(alias)


def models(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="List this model's versions.")] = None,
) -> None:
    """List the registered models, or the versions of one."""
    cluster = connect()
    if name is None:
        found = cluster.models.list()
        if not found:
            say("no models yet; make one: shoal register NAME RUN --alias champion")
            return
        rows = [(m.model, m.latest, m.num_versions, _aliases_text(m.aliases)) for m in found]
        show_table(("model", "latest", "versions", "aliases"), rows, numbers=("latest", "versions"))
        return
    versions = cluster.models.versions(name)
    show_table(
        ("version", "aliases", "run", "age"),
        [(v.name, " ".join(v.aliases), v.resolved.run, age_text(v.resolved.created)) for v in versions],
        numbers=("age",),
    )


def register(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")],
    run: Annotated[str, typer.Argument(metavar="RUN|SWEEP", help="A run, or a sweep for its best trial's.")],
    alias: Annotated[
        str | None, typer.Option(metavar="NAME", help="Point this alias at the new version.")
    ] = None,
) -> None:
    """Make a run's best checkpoint the next version of a model."""
    cluster = connect()
    version = cluster.models.register(model, _source(cluster, run), alias=alias)
    selector = alias or str(version.version)
    show_facts(
        {
            "model": f"{version.name}{f' @{alias}' if alias else ''}",
            "run": version.resolved.run,
            "folder": version.path,
            "next": f"shoal serve serve_apps.{model}:app --model {model}@{selector}",
        }
    )


def alias(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")],
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as champion.")],
    version: Annotated[int, typer.Argument(metavar="VERSION", help="Its number.")],
) -> None:
    """Point an alias at a version, in one step.

    An app that serves the alias goes on with its version until it is served again.
    """
    connect().models.set_alias(model, name, version)
    say(f"{model}@{name} is now {model}@{version}")


def _source(cluster: Cluster, name: str) -> Any:
    """The run of this name, or the best run of the sweep of this name.

    Raises:
        NotFoundError: there is neither; or the sweep has no trial with a result yet.
    """
    from shoal.tune import SweepRecord, open_sweep

    if SweepRecord.exists(cluster.storage, name):
        return cluster.run(open_sweep(cluster.storage, name).best.run)
    return cluster.run(name)


def _aliases_text(aliases: Any) -> str:
    return " ".join(f"{alias}={version}" for alias, version in sorted(aliases.items()))
