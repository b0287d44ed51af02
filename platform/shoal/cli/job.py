"""What ``python -m jobs.digits train lr=1e-3`` runs: the shell's ``train`` and ``tune``, the recipe given.

It works attached to a cluster that runs, inside ``ray job submit``, and under ``torchrun`` without Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from shoal.cli import options as opt
from shoal.cli.command import WORK, command, make_app
from shoal.errors import RequestError

if TYPE_CHECKING:
    import typer

    from shoal.recipe import Recipe


def main(recipe: type[Recipe], arguments: Sequence[str] | None = None) -> NoReturn:
    """Train or tune ``recipe`` as the command line says; ends the process.

    ``arguments`` is the command line without the program; None for this process's own.
    """
    app = make_job_app(importable(recipe))
    app(None if arguments is None else list(arguments), prog_name=f"python -m {_module_of(recipe)}")
    raise SystemExit(0)


def importable(recipe: type[Recipe]) -> type[Recipe]:
    """The same recipe under the name that workers can import it by.

    Under ``python -m jobs.digits`` the class is ``__main__.Digits``, which no worker finds.
    """
    from shoal.recipe import load_recipe, recipe_ref

    if recipe.__module__ != "__main__":
        return recipe
    ref = recipe_ref(recipe)
    return recipe if ref.startswith("__main__:") else load_recipe(ref)


def make_job_app(recipe: type[Recipe]) -> typer.Typer:
    """The commands of a job with this recipe."""
    name, module = recipe.__name__, _module_of(recipe)
    prefix = f"python -m {module}"
    summary = (recipe.__doc__ or "").strip().partition("\n")[0]
    app = make_app(name.lower(), f"{name}: {summary}" if summary else name)

    def train(
        fields: opt.Fields = None,
        workers: opt.Workers = None,
        steps: opt.Steps = None,
        name: opt.Name = None,
        seed: opt.Seed = 0,
        precision: opt.Precision = "fp32",
        checkpoint_every: opt.CheckpointEvery = None,
        keep: opt.Keep = None,
        init_from: opt.InitFrom = None,
        dry_run: opt.DryRun = False,
    ) -> None:
        """Train the recipe: on the running cluster, or under torchrun without one."""
        from shoal.cli.torchrun import is_torchrun, train_under_torchrun
        from shoal.cli.training import TrainOptions, start
        from shoal.recipe import parse_fields

        options = TrainOptions(
            workers=workers,
            steps=steps,
            name=name,
            seed=seed,
            precision=precision,
            checkpoint_every=checkpoint_every,
            keep=keep,
            init_from=init_from,
        )
        made = parse_fields(recipe, fields or [])
        if is_torchrun():
            if dry_run:
                raise RequestError(f"--dry-run takes its step in one process: {prefix} train --dry-run")
            train_under_torchrun(made, options)
        else:
            start(made, options, words=fields or [], detach=False, dry_run=dry_run)

    def tune(
        space: opt.SpaceFields = None,
        trials: opt.Trials = None,
        concurrent: opt.Concurrent = None,
        workers: opt.TrialWorkers = 1,
        steps: opt.Steps = None,
        name: opt.SweepName = None,
        seed: opt.Seed = 0,
        scheduler: opt.Scheduler = "asha",
        perturb_every: opt.PerturbEvery = None,
    ) -> None:
        """Search the recipe's fields on the running cluster."""
        from shoal.cli.tuning import SweepOptions, tune_and_wait

        options = SweepOptions(
            trials=trials,
            concurrent=concurrent,
            workers=workers,
            steps=steps,
            name=name,
            seed=seed,
            scheduler=scheduler,
            perturb_every=perturb_every,
        )
        tune_and_wait(recipe, space or [], options)

    examples = (
        f"{prefix} train --workers 2",
        f"ray job submit --working-dir . -- {prefix} train",
        f"torchrun --nproc-per-node 2 -m {module} train",
    )
    command(app, panel=WORK, examples=examples, kept=False)(train)
    command(app, panel=WORK, examples=(f"{prefix} tune lr=log:1e-4..1e-1",), kept=False)(tune)
    return app


def _module_of(recipe: type[Recipe]) -> str:
    from shoal.recipe import recipe_ref

    return recipe_ref(recipe).partition(":")[0]
