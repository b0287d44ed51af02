"""Checks of options: whatever is wrong with what was asked for, all at once, each with what would do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.errors import RequestError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from shoal.config import Interval


class Rule(NamedTuple):
    """What one option may be."""

    fits: Callable[[Any], bool]
    """Whether a value may be used; takes any object."""
    valid: str
    """The same in words, with an example."""


def check(options: DataclassInstance, rules: Mapping[str, Rule]) -> None:
    """Every field of ``options`` against its rule; None is valid where it is the default.

    Raises:
        RequestError: names each wrong option with its value and what would be valid.
    """
    problems = []
    for field in fields(options):
        value, rule = getattr(options, field.name), rules[field.name]
        if not (value is None and field.default is None) and not rule.fits(value):
            problems.append(f"{field.name}={value!r}: {rule.valid}")
    refuse(problems)


def refuse(problems: Iterable[str]) -> None:
    """Raise a RequestError that lists the problems; do nothing when there is none."""
    lines = list(problems)
    if len(lines) == 1:
        raise RequestError(lines[0])
    if lines:
        raise RequestError("\n".join(["cannot be done as asked:", *(f"  {line}" for line in lines)]))


def whole_number(at_least: float = -math.inf, at_most: float = math.inf) -> Callable[[Any], bool]:
    """An int within the bounds; True is none, although Python counts it as 1."""
    return lambda value: _is_number(value, int) and at_least <= value <= at_most


def one_of(*choices: str) -> Callable[[Any], bool]:
    """One of these texts."""
    return lambda value: isinstance(value, str) and value in choices


def is_text(value: Any) -> bool:
    """Any text; what it names is checked where that is looked up."""
    return isinstance(value, str)


def is_amount(value: Any) -> bool:
    """A number, 0 or more; neither NaN nor infinite."""
    return _is_number(value, (int, float)) and 0 <= value < math.inf


def is_worker_range(value: Any) -> bool:
    """A number or a range of workers, 1 or more."""
    from shoal.config import Range

    try:
        return Range.parse(value).min >= 1
    except RequestError:
        return False


def is_interval(value: Any) -> bool:
    """A time between checkpoints: seconds, or a text such as ``30s`` or ``auto``."""
    try:
        interval(value)
    except RequestError:
        return False
    return True


def interval(value: float | str) -> Interval:
    """``30`` and ``"30s"`` are 30 seconds.

    Raises:
        RequestError: neither, nor ``"auto"``; NaN, below 1 ms, or longer than a century.
    """
    from shoal.config import Duration, Interval

    return Interval.parse(Duration(value) if _is_number(value, (int, float)) else value)  # type: ignore[arg-type]


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
