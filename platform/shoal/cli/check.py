"""``shoal check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.command import CLUSTER, command
from shoal.cli.console import say, show_facts
from shoal.cli.options import Set, Target
from shoal.cli.project import project_here
from shoal.errors import StorageError


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    examples = (
        "shoal check",
        "shoal check --set train.workers=2 --set serve.port=8001",
        "shoal check --schema  # writes .shoal/cluster.schema.json",
    )
    command(app, panel=CLUSTER, examples=examples)(check)


def check(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="PATH", help="The file to check; with --schema, the file to write."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Write the JSON Schema with which editors complete cluster.yaml.")
    ] = False,
    target: Target = None,
    set_: Set = None,
) -> None:
    """Check cluster.yaml against its target: every problem at once, with its place and the valid choices."""
    if schema:
        _write_schema(path)
    else:
        _check(path, target, set_ or [])


def _check(path: Path | None, target: str | None, overrides: list[str]) -> None:
    from shoal.config import Machine, load, notes
    from shoal.config.local import plan_local

    config = load(path, target=target, overrides=overrides)
    remarks = notes(config)
    facts = {"cluster": config.name, "target": config.target, "storage": config.storage}
    if config.target == "local":
        plan = plan_local(config, Machine.here())
        facts["becomes"] = f"{plan.num_cpus} CPUs, {plan.num_gpus} GPUs on this machine"
        remarks = [*remarks, *plan.notes]
    show_facts(facts)
    for remark in remarks:
        say(f"note: {remark}")
    say("no problems")


def _write_schema(path: Path | None) -> None:
    import json

    from shoal.config import json_schema

    path = path or project_here() / ".shoal" / "cluster.schema.json"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(json.dumps(json_schema(), indent=2) + "\n")
    except OSError as err:
        raise StorageError(
            f"cannot write {path}: {err.strerror}; name another: shoal check --schema PATH"
        ) from err
    say(f"wrote {path}")
