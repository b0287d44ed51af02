"""What ``python -m jobs.digits train lr=1e-3`` runs: the shell's ``train`` and ``tune``, the recipe given.

It works attached to a cluster that runs, inside ``ray job submit``, and under ``torchrun`` without Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from shoal.cli.command import WORK, RecipeCommand, command, make_app, of_recipe
from shoal.cli.train import train
from shoal.cli.tune import tune

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

    examples = (
        f"{prefix} train --workers 2",
        f"ray job submit --working-dir . -- {prefix} train",
        f"torchrun --nproc-per-node 2 -m {module} train",
    )
    # A job that is submitted has a driver on the cluster already.
    own_train, own_tune = of_recipe(train, recipe, without={"detach"}), of_recipe(tune, recipe)
    command(app, panel=WORK, examples=examples, kept=False, cls=RecipeCommand)(own_train)
    searches = (f"{prefix} tune lr=log:1e-4..1e-1",)
    command(app, panel=WORK, examples=searches, kept=False, cls=RecipeCommand)(own_tune)
    return app


def _module_of(recipe: type[Recipe]) -> str:
    from shoal.recipe import recipe_ref

    return recipe_ref(recipe).partition(":")[0]
