"""What a sweep may choose: domains of a recipe's fields, and the shell's words for them. No Ray here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import RecipeError, RequestError, did_you_mean
from shoal.recipe import Recipe, field_values, replace

_GOLDEN = 0.381966
"""A place inside a range of numbers, at no end of it."""
_MAX_WHOLE = 2**53
"""Above it floats, in which samplers reckon, leave whole numbers out."""


@dataclass(frozen=True)
class Uniform:
    """Any number from ``low`` to ``high``; with ``log``, every power of ten is as likely as every other."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{'log:' if self.log else ''}{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Integers:
    """A whole number from ``low`` to ``high``, both included."""

    low: int
    high: int
    log: bool = False

    def __str__(self) -> str:
        return f"{'log:' if self.log else ''}{self.low}..{self.high}"


@dataclass(frozen=True)
class Choice:
    """One of ``values``, which have no order."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


Domain = Uniform | Integers | Choice
Space = Mapping[str, Domain]
"""The fields that a sweep chooses, by name."""


def uniform(low: float, high: float) -> Uniform:
    """Any number from ``low`` to ``high``, all equally likely."""
    return Uniform(low, high)


def loguniform(low: float, high: float) -> Uniform:
    """Any number from ``low`` to ``high``, both positive, each order of magnitude equally likely."""
    return Uniform(low, high, log=True)


def randint(low: int, high: int, *, log: bool = False) -> Integers:
    """A whole number from ``low`` to ``high``, *both* included."""
    return Integers(low, high, log=log)


def choice(values: Sequence[Any]) -> Choice:
    """One of ``values``."""
    return Choice(tuple(values))


_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"(log:)?({_NUMBER})\.\.({_NUMBER})")
_WHOLE = re.compile(r"[+-]?\d{1,300}")  # int() refuses thousands of digits; as a float they are infinite


def parse_space(words: Sequence[str]) -> tuple[dict[str, str], dict[str, Domain]]:
    """Fixed fields (as text) and the space to search, from shell words.

    ``lr=log:1e-4..1e-1`` and ``dropout=0.0..0.5`` are ranges, ``hidden=64,128`` is a choice, ``wd=1e-2`` is
    fixed. ``layers=1..4`` is a range of whole numbers, unless the field takes any number (`check_space`).

    Raises:
        RequestError: words that are not ``field=...``, or name a field twice; all of them at once.
    """
    fixed: dict[str, str] = {}
    space: dict[str, Domain] = {}
    problems = []
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            problems.append(
                f"{word!r} is not of the form field=value, such as lr=log:1e-4..1e-1 or hidden=64,128"
            )
        elif name in fixed or name in space:
            problems.append(f"{name}: given twice")
        elif text.startswith("log:") and not _RANGE.fullmatch(text):
            problems.append(f"{name}: {text!r} is not a range; write log:LOW..HIGH, such as log:1e-4..1e-1")
        elif (domain := _parse_domain(text)) is None:
            fixed[name] = text
        else:
            space[name] = domain
    if problems:
        raise _refusal(problems)
    return fixed, space


def _parse_domain(text: str) -> Domain | None:
    if match := _RANGE.fullmatch(text):
        log, low, high = bool(match[1]), match[2], match[3]
        if _WHOLE.fullmatch(low) and _WHOLE.fullmatch(high):
            return Integers(int(low), int(high), log=log)
        return Uniform(float(low), float(high), log=log)
    if "," in text:
        return Choice(tuple(part.strip() for part in text.split(",") if part.strip()))
    return None


def check_space(recipe: Recipe, space: Space) -> dict[str, Domain]:
    """The space as it will be searched: values in their field's type, whole numbers where it wants them.

    Raises:
        RequestError: nothing to search, a field the recipe does not have, a range upside down or not positive
            where it must be, values that do not fit the field; all of them at once.
    """
    problems: list[str] = []
    checked: dict[str, Domain] = {}
    known = field_values(recipe)
    for name, domain in space.items():
        if name not in known:
            hint = did_you_mean(name, known) or ";"
            problems.append(f"{name}: no such field{hint} {type(recipe).__name__} has: {', '.join(known)}")
            continue
        found = _check_domain(recipe, name, domain)
        if isinstance(found, str):
            problems.append(f"{name}: {found}")
        else:
            checked[name] = found
    if not space:
        problems.append(
            "nothing to search; give a field a range or a choice, such as "
            "{'lr': shoal.loguniform(1e-4, 1e-1)} in Python or lr=log:1e-4..1e-1 on the shell"
        )
    if problems:
        raise _refusal(problems)
    return checked


def _check_domain(recipe: Recipe, name: str, domain: object) -> Domain | str:
    """The domain as it fits the field, or what is wrong with it."""
    match domain:
        case Choice(values):
            return _check_choice(recipe, name, values)
        case Uniform(low, high) | Integers(low, high):
            if not (_is_number(low) and _is_number(high) and low < high and math.isfinite(high - low)):
                return (
                    f"the range {domain} must have two finite ends, the lower one first, and whole numbers within "
                    "2**53 of 0"
                )
            if domain.log and low <= 0:
                return f"the range {domain} is by orders of magnitude and must begin above 0"
            if isinstance(domain, Integers) and _fits(recipe, name, low + 0.5) is None:
                domain = Uniform(float(low), float(high), log=domain.log)  # the field takes any number
            inside = low + (high - low) * _GOLDEN if isinstance(domain, Uniform) else low
            wrong = _fits(recipe, name, low) or _fits(recipe, name, high) or _fits(recipe, name, inside)
            return wrong or domain
    return (
        f"{domain!r} is not a domain; use shoal.uniform(low, high), shoal.loguniform(low, high), "
        "shoal.randint(low, high) or shoal.choice([...])"
    )


def _check_choice(recipe: Recipe, name: str, values: tuple[Any, ...]) -> Choice | str:
    if not values:
        return "a choice of nothing"
    wrong = [problem for value in values if (problem := _fits(recipe, name, value))]
    if wrong:
        return "; ".join(wrong)
    typed = [field_values(replace(recipe, **{name: value}))[name] for value in values]
    different = [value for index, value in enumerate(typed) if value not in typed[:index]]
    return Choice(tuple(different))


def _fits(recipe: Recipe, name: str, value: Any) -> str | None:
    """What is wrong with this value for the field; None when it fits."""
    try:
        replace(recipe, **{name: value})
    except RecipeError as err:
        lines = [line.strip() for line in err.message.splitlines()]
        reason = next((line for line in lines if line.startswith(f"{name}:")), lines[0])
        return reason.removeprefix(f"{name}: ")
    return None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return (
        abs(value) <= _MAX_WHOLE
        if isinstance(value, int)
        else isinstance(value, float) and math.isfinite(value)
    )


def _refusal(problems: Sequence[str]) -> RequestError:
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    return RequestError(
        "\n".join([f"the search space has {count}:", *(f"  {problem}" for problem in problems)])
    )


def num_combinations(space: Space) -> float:
    """How many different trials the space has; ``inf`` with any continuous range."""
    total = 1.0
    for domain in space.values():
        match domain:
            case Uniform():
                return math.inf
            case Integers(low, high):
                total *= high - low + 1
            case Choice(values):
                total *= len(values)
    return total


def describe_space(space: Space) -> dict[str, Any]:
    """The space as JSON-able values, for a sweep's identity."""
    plain: dict[str, Any] = {}
    for name, domain in space.items():
        match domain:
            case Choice(values):
                plain[name] = {"choice": list(values)}
            case Uniform(low, high, log):
                plain[name] = {"uniform": [low, high], "log": log}
            case Integers(low, high, log):
                plain[name] = {"integers": [low, high], "log": log}
    return plain
