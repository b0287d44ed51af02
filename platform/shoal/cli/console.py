"""Output for people: tables of at most 100 columns, plain text where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

MAX_WIDTH = 100
_PIPE_WIDTH = 1000


def console() -> Console:
    """Standard output: a terminal's width up to 100 columns; in a pipe as wide as it takes, for other programs."""
    from rich.console import Console

    found = Console(highlight=False)
    return Console(highlight=False, width=min(found.width, MAX_WIDTH) if found.is_terminal else _PIPE_WIDTH)


def say(text: str = "") -> None:
    """One line as it is: never wrapped, so that it can be copied."""
    print(text, flush=True)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Iterable[str] = ()) -> None:
    """A table; ``numbers`` are aligned to the right and never folded."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    aligned = set(numbers)
    for column in columns:
        is_number = column in aligned
        justify: Literal["right", "left"] = "right" if is_number else "left"
        table.add_column(column, justify=justify, no_wrap=is_number, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)


def show_facts(facts: Mapping[str, Any]) -> None:
    """Names and values below each other; a value of several lines stays under its name."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        first, *more = str(value).split("\n")
        say(f"{name.ljust(width)}  {first}".rstrip())
        for line in more:
            say(f"{' ' * width}  {line}")


def age_text(then: float) -> str:
    """How long ago, in the one unit that matters: ``42s``, ``3m``, ``5h``, ``2d``."""
    return duration_text(time.time() - then)


def duration_text(seconds: float) -> str:
    """A duration in the one unit that matters."""
    seconds = max(0.0, seconds)
    for limit, unit, size in ((120, "s", 1), (7200, "m", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def values_text(values: Mapping[str, float] | None) -> str:
    """Metrics in one line: ``accuracy 0.97  loss 0.11``."""
    return "  ".join(f"{name} {value:.4g}" for name, value in (values or {}).items())
