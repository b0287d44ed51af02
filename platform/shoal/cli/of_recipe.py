"""How a function of a recipe becomes the body of a command: of one that is named, or of a job's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container
from typing import Any

from shoal.cli import options as opt
from shoal.recipe import Recipe


def of_recipe(
    function: Callable[..., None], recipe: type[Recipe] | None = None, *, without: Container[str] = ()
) -> Callable[..., None]:
    """``function`` with its first parameter, a recipe, given, so that only the options are left to be typed.

    The recipe is ``recipe``; without one, that which an argument MODULE[:CLASS] names. ``without`` names options
    that are left at their defaults.
    """
    signature = inspect.signature(function, eval_str=True)
    parameters = [p for name, p in [*signature.parameters.items()][1:] if name not in without]
    if recipe is None:
        parameters.insert(
            0, inspect.Parameter("module", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=opt.Module)
        )

    @functools.wraps(function)
    def run(**typed: Any) -> None:
        from shoal.cli.project import load_recipe

        function(recipe or load_recipe(typed.pop("module")), **typed)

    # What typer reads.
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
