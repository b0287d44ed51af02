"""Train a recipe on the running cluster and wait for it, as ``shoal train`` and a job's ``train`` do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.cli.console import console, say, show_facts, values_text
from shoal.cli.interrupt import sigterm_interrupts
from shoal.errors import NotFoundError, RequestError

if TYPE_CHECKING:
    from shoal.recipe import Recipe
    from shoal.train.options import RunOptions
    from shoal.train.run import Run


def start(recipe: Recipe, options: RunOptions, *, words: Sequence[str], detach: bool, dry_run: bool) -> None:
    """Train as the options say: here and now, on the cluster without us, or not at all.

    ``words`` are the recipe's fields as they were typed.

    Raises:
        RequestError, RecipeError, EnvironmentFailure: as `train_and_wait`.
    """
    from shoal.cli import torchrun

    if detach and dry_run:
        raise RequestError("--detach starts a run and --dry-run starts nothing: choose one")
    if torchrun.is_torchrun():
        if detach or dry_run:
            raise RequestError(
                f"{'--detach' if detach else '--dry-run'} takes one process: leave torchrun out"
            )
        torchrun.train_under_torchrun(recipe, options)
    elif dry_run:
        from shoal.cli.dry_run import dry_run as rehearse

        rehearse(recipe, options)
    elif detach:
        from shoal.cli.detached import train_detached

        train_detached(recipe, words, options)
    else:
        train_and_wait(recipe, options)


def train_and_wait(recipe: Recipe, options: RunOptions) -> None:
    """Train on the running cluster, driven by this process; shows progress, then the result.

    Ctrl-C and SIGTERM commit a checkpoint and stop; the same command goes on from there.

    Raises:
        RequestError: no cluster runs, or the run cannot be as asked.
        RecipeError, EnvironmentFailure: as `Run.wait`.
    """
    from shoal.cli.project import connect

    cluster = connect()
    with sigterm_interrupts():  # after attaching: Ray installs a handler of its own
        run = cluster.train(recipe, **vars(options))
        say(run.note or f"run {run.name}")
        try:
            run.wait()
        except KeyboardInterrupt:
            if not console().is_terminal:  # there the bar ended in a line that says as much
                show_result(run)
            raise
    show_result(run)


def show_result(run: Run) -> None:
    """Where the run stands, and what to do next."""
    from shoal.train.run import best_text

    record = run.record
    target = record.target_steps
    facts = {
        "run": run.name,
        "state": str(run.state),
        "steps": f"{run.step:,}{f' of {target:,}' if target else ''}",
        "val": values_text(record.last_eval("val")),
        "test": values_text(record.last_eval("test")),
        "best": best_text(record),
        "checkpoint": _checkpoint_text(run),
        "next": _next_text(run),
    }
    show_facts({name: text for name, text in facts.items() if text})


def _checkpoint_text(run: Run) -> str:
    try:
        return str(run.best_checkpoint())
    except NotFoundError:
        return ""


def _next_text(run: Run) -> str:
    from shoal.train.run import where_it_goes_on

    if str(run.state) != "finished":
        return where_it_goes_on(run.record)
    identity = run.record.identity() or {}
    model = str(identity.get("recipe", "")).rpartition(":")[2].lower() or "NAME"
    return f"shoal register {model} {run.name} --alias champion"
