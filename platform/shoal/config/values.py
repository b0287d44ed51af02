"""Values that people write as text: ranges ("1..4"), sizes ("8Gi"), durations ("30s"), GPUs ("L4:1").

Each type has ``parse``, which takes what a file or a shell holds, and ``str``, which gives it back:
``T.parse(str(value)) == value`` for every value. All are immutable, compare by value and need
pydantic only when they are fields of a pydantic model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Self

from shoal.errors import RequestError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema

# Bounded on purpose: int() refuses more than 4,300 digits with an error of its own.
_DIGITS = "[0-9]{1,19}"
_DECIMAL = rf"{_DIGITS}(\.[0-9]{{1,12}})?"

_SIZE_UNITS: Mapping[str, int] = {
    "Ti": 2**40,
    "T": 10**12,
    "Gi": 2**30,
    "G": 10**9,
    "Mi": 2**20,
    "M": 10**6,
    "Ki": 2**10,
    "K": 10**3,
}
_DURATION_UNITS: Mapping[str, Decimal] = {
    "d": Decimal(86_400),
    "h": Decimal(3_600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
}
_MAX_COUNT = 10**9
_SHORTEST_S = 0.001
"""Of the time between checkpoints."""
_MAX_DURATION_S = 100 * 365 * 86_400
_MAX_SIZE_BYTES = 2**63 - 1


class _TextValue:
    """Makes a value usable as a pydantic field: ``parse`` validates, ``str`` serializes."""

    _json_schema: ClassVar[Mapping[str, Any]]

    @classmethod
    def parse(cls, value: object) -> Self:
        raise NotImplementedError

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            _as_pydantic_error(cls.parse), serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return dict(cls._json_schema)


def _as_pydantic_error(parse: Callable[[object], Any]) -> Callable[[object], Any]:
    from pydantic_core import PydanticCustomError

    def validate(value: object) -> Any:
        try:
            return parse(value)
        except RequestError as error:
            raise PydanticCustomError("shoal_value", str(error)) from None

    return validate


@dataclass(frozen=True)
class Range(_TextValue):
    """How many of something, from ``min`` to ``max``, both included; written ``1..4``, or ``3`` for 3..3."""

    min: int
    max: int

    _json_schema: ClassVar[Mapping[str, Any]] = {
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": rf"^{_DIGITS}(\.\.{_DIGITS})?$"},
        ],
        "examples": ["1..4", 3],
    }

    def __post_init__(self) -> None:
        if self.min < 0 or self.max > _MAX_COUNT:
            raise RequestError(f"a range is within 0..{_MAX_COUNT}")
        if self.min > self.max:
            raise RequestError(f"the range is upside down; write {self.max}..{self.min}")

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read ``"1..4"``, ``"3"`` or ``3``.

        Raises:
            RequestError: it is none of these, is negative, or its ends are the wrong way round.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(value, value)
        match = re.fullmatch(rf"({_DIGITS})(?:\.\.({_DIGITS}))?", value) if isinstance(value, str) else None
        if match is None:
            raise RequestError("not a range; write LOW..HIGH such as 1..4, or one whole number such as 3")
        low = int(match[1])
        return cls(low, low if match[2] is None else int(match[2]))

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min}..{self.max}"

    def __contains__(self, count: object) -> bool:
        return isinstance(count, int) and self.min <= count <= self.max


class Size(int, _TextValue):
    """A number of bytes, 0 or more; written ``8Gi`` (2^30), ``8G`` (10^9) or as plain bytes."""

    _json_schema: ClassVar[Mapping[str, Any]] = {
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": rf"^{_DECIMAL}(Ti|T|Gi|G|Mi|M|Ki|K)?$"},
        ],
        "examples": ["8Gi", "512Mi"],
    }

    def __new__(cls, size_bytes: int) -> Self:
        if not 0 <= size_bytes <= _MAX_SIZE_BYTES:
            raise RequestError(f"a size is from 0 to {_MAX_SIZE_BYTES} bytes")
        return super().__new__(cls, size_bytes)

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read ``"8Gi"``, ``"1.5Gi"``, ``"1024"`` or ``1024`` (bytes).

        Raises:
            RequestError: no such unit, negative, too large, or not a whole number of bytes.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(value)
        match = re.fullmatch(rf"({_DECIMAL})([^0-9].*)?", value.strip()) if isinstance(value, str) else None
        if match is None:
            raise RequestError("not a size; write a number with a unit, such as 8Gi, or whole bytes")
        number, unit = match[1], (match[3] or "").strip()
        if unit and unit not in _SIZE_UNITS:
            near = {known.lower(): known for known in _SIZE_UNITS}.get(unit.lower().removesuffix("b"))
            hint = f"; did you mean {number}{near}?" if near else ""
            raise RequestError(f"no such unit {unit!r}, only {', '.join(_SIZE_UNITS)}{hint}")
        size_bytes = Fraction(number) * _SIZE_UNITS.get(unit, 1)
        if size_bytes.denominator != 1:
            raise RequestError("not a whole number of bytes")
        return cls(size_bytes.numerator)

    def __str__(self) -> str:
        for unit, size_bytes in _SIZE_UNITS.items():
            if self and self % size_bytes == 0:
                return f"{self // size_bytes}{unit}"
        return int.__repr__(self)

    def __repr__(self) -> str:
        return f"Size('{self}')"


class Duration(float, _TextValue):
    """A length of time in seconds, 0 or more; written ``30s``, ``250ms``, ``5m``, ``1.5h`` or ``2d``.

    Kept to the nanosecond, so that every duration has a short text.
    """

    _json_schema: ClassVar[Mapping[str, Any]] = {
        "type": "string",
        "pattern": rf"^{_DECIMAL}(ms|s|m|h|d)$",
        "examples": ["30s", "5m", "250ms"],
    }

    def __new__(cls, seconds: float) -> Self:
        if not 0 <= seconds <= _MAX_DURATION_S:  # also refuses NaN
            raise RequestError("a duration is from 0s to 100 years")
        return super().__new__(cls, round(seconds, 9))

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read ``"30s"``. A bare number is refused: whether 30 meant seconds or milliseconds is a guess.

        Raises:
            RequestError: no number, no unit, no such unit, or longer than a century.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise RequestError(f"a duration needs a unit; write {value}s for seconds")
        match = (
            re.fullmatch(rf"({_DECIMAL})\s*(ms|s|m|h|d)", value.strip()) if isinstance(value, str) else None
        )
        if match is None:
            raise RequestError("not a duration; write a number and ms, s, m, h or d, such as 30s")
        return cls(float(Fraction(match[1]) * Fraction(_DURATION_UNITS[match[3]])))

    def __str__(self) -> str:
        exact_s = Decimal(float.__repr__(self))
        for unit, seconds in _DURATION_UNITS.items():
            count = int(exact_s / seconds)
            if count and count * seconds == exact_s:
                return f"{count}{unit}"
        return f"{exact_s.normalize():f}s"

    def __repr__(self) -> str:
        return f"Duration('{self}')"


class Interval(Duration):
    """Seconds between checkpoints, 1 ms or more, written like a duration; or ``auto``, which is 0."""

    _json_schema: ClassVar[Mapping[str, Any]] = {
        "type": "string",
        "pattern": rf"^(auto|{_DECIMAL}(ms|s|m|h|d))$",
        "examples": ["30s", "auto"],
    }

    @property
    def seconds(self) -> float | None:
        """None for ``auto``."""
        return float(self) or None

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read ``"30s"`` or ``"auto"``.

        Raises:
            RequestError: neither; below 1 ms, or longer than a century.
        """
        if value == "auto":
            return cls(0)
        if isinstance(value, cls):
            return value
        parsed = Duration.parse(value)
        if parsed < _SHORTEST_S:
            raise RequestError("must be at least 1ms; or write auto")
        return cls(parsed)

    def __str__(self) -> str:
        return super().__str__() if self else "auto"


@dataclass(frozen=True)
class Gpus(_TextValue):
    """GPUs of one machine: ``count`` of them, of a ``kind`` such as L4; written ``L4:2``, ``L4`` or ``2``."""

    count: int
    kind: str = ""
    """Product name; empty for any."""

    _json_schema: ClassVar[Mapping[str, Any]] = {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": rf"^({_DIGITS}|[A-Za-z][A-Za-z0-9-]*(:{_DIGITS})?)$"},
        ],
        "examples": ["L4:1", "H100:8", 1],
    }

    def __post_init__(self) -> None:
        if not 1 <= self.count <= _MAX_COUNT:
            raise RequestError("at least 1 GPU; leave gpu out for machines without")

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read ``"L4:2"`` (two L4), ``"L4"`` (one) or ``2`` (two of any kind).

        Raises:
            RequestError: it is none of these, or the count is 0.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(value)
        if isinstance(value, str):
            if re.fullmatch(_DIGITS, value):
                return cls(int(value))
            if match := re.fullmatch(rf"([A-Za-z][A-Za-z0-9-]*)(?::({_DIGITS}))?", value):
                return cls(int(match[2] or 1), match[1])
        raise RequestError("not GPUs; write KIND:COUNT such as L4:1, or a count such as 1")

    def __str__(self) -> str:
        return f"{self.kind}:{self.count}" if self.kind else str(self.count)


@dataclass(frozen=True)
class AtLeast:
    """Annotation that bounds a value type from below; of a range, its lower end."""

    lowest: Duration | int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import PydanticCustomError, core_schema

        def check(value: Any) -> Any:
            if (value.min if isinstance(value, Range) else value) < self.lowest:
                raise PydanticCustomError(
                    "shoal_value", "must be at least {text}", {"text": str(self.lowest)}
                )
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))
