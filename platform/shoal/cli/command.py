"""How a function becomes a command: its docstring and examples are the help, its errors become exit codes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

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
) -> Callable[[F], F]:
    """Add the decorated function to ``app``.

    ``panel`` is the heading it is listed under. Examples are ``kept`` in `EXAMPLES`, each parsed by a test.
    """

    def add(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with reported_failures():
                return function(*args, **kwargs)

        text = inspect.cleandoc(function.__doc__ or "")
        # "\b" keeps the lines of a paragraph as they are.
        shown = "\n".join(f"  {example}" for example in examples)
        app.command(name=name, help=f"{text}\n\n\b\nExamples:\n{shown}", rich_help_panel=panel)(run)
        if kept:
            EXAMPLES.extend(example.partition("  #")[0] for example in examples)
        return function

    return add


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
