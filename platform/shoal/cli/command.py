"""How a function becomes a command: its docstring and examples are the help, its errors become exit codes."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from shoal.cli.failures import reported_failures
from shoal.cli.project import load_recipe

if TYPE_CHECKING:
    from shoal.recipe import Recipe

CLUSTER = "Cluster"
WORK = "Work"
MODELS = "Models & apps"

EXAMPLES: list[str] = []
"""Every example that some command's help shows."""

F = TypeVar("F", bound=Callable[..., Any])

_MODULE = Annotated[str, typer.Argument(metavar="MODULE[:CLASS]", help="The recipe, such as jobs.digits.")]


def make_app(name: str, summary: str) -> typer.Typer:
    """An empty group of commands with our conventions."""
    return typer.Typer(
        name=name,
        help=summary,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def command(
    app: typer.Typer,
    *,
    panel: str,
    examples: Sequence[str],
    name: str | None = None,
    kept: bool = True,
    cls: type[TyperCommand] = TyperCommand,
) -> Callable[[F], F]:
    """Add the decorated function to ``app``.

    ``panel`` is the heading it is listed under. Examples are ``kept`` in `EXAMPLES`, each parsed by a test. ``cls``
    reads the command line.
    """

    def add(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with reported_failures():
                return function(*args, **kwargs)

        # typer keeps the line ends of every paragraph but the first, and would break the text where the source does.
        text = re.sub(r"(?<=\S)\n(?=\S)", " ", inspect.cleandoc(function.__doc__ or ""))
        shown = "\n".join(f"  {example}" for example in examples)
        app.command(name=name, cls=cls, help=f"{text}\n\nExamples:\n{shown}", rich_help_panel=panel)(run)
        if kept:
            EXAMPLES.extend(example.partition("  #")[0] for example in examples)
        return function

    return add


class RecipeCommand(TyperCommand):
    """A command with a recipe's fields among its words. Whoever types ``--lr 1e-3`` is told to write ``lr=1e-3``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except TyperException as err:
            # No such option (its class is private). `--help` is what it offers when no option is near.
            if hasattr(err, "possibilities") and set(err.possibilities or ()) <= {"--help"}:
                field = str(err.option_name).lstrip("-").replace("-", "_")  # type: ignore[attr-defined]
                err.message += f"; a field of the recipe is written without dashes: {field}=VALUE"
                err.possibilities = None
            raise


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
            0, inspect.Parameter("module", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=_MODULE)
        )

    @functools.wraps(function)
    def run(**typed: Any) -> None:
        function(recipe or load_recipe(typed.pop("module")), **typed)

    # What typer reads.
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
