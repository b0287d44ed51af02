"""The value types: text to value and back, bounds, and schemas that agree with the parsers."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter, ValidationError

from shoal.config.values import Duration, Gpus, Range, Size
from shoal.errors import RequestError

fast = settings(max_examples=40, deadline=None, database=None, derandomize=True)

ranges = st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)).map(lambda ends: Range(min(ends), max(ends)))
sizes = st.one_of(
    st.integers(0, 2**63 - 1),
    st.builds(
        lambda count, unit: count * unit, st.integers(0, 999), st.sampled_from([2**10, 2**30, 10**6, 10**12])
    ),
).map(Size)
durations = st.one_of(
    st.floats(0, 1e9, allow_nan=False),
    st.integers(0, 10_000_000).map(lambda milliseconds: milliseconds / 1000),
).map(Duration)
gpus = st.builds(Gpus, st.integers(1, 64), st.sampled_from(["", "L4", "H100", "RTX-4090"]))
values = st.one_of(ranges, sizes, durations, gpus)


@fast
@given(values)
def test_text_of_a_value_reads_back_as_the_value(value: Any) -> None:
    again = type(value).parse(str(value))
    assert again == value
    assert type(again) is type(value)


@fast
@given(values)
def test_values_survive_json_pickle_and_copy(value: Any) -> None:
    adapter = TypeAdapter(type(value))
    assert adapter.validate_python(json.loads(adapter.dump_json(value))) == value
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.deepcopy(value) == value


@fast
@given(values)
def test_the_schema_accepts_every_value_that_we_write(value: Any) -> None:
    Draft202012Validator(TypeAdapter(type(value)).json_schema()).validate(str(value))


@fast
@given(
    st.sampled_from([Range, Size, Duration, Gpus]),
    st.one_of(
        st.text(alphabet="0123456789.:-+eE KMGTihmsdL٣", max_size=12),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.none(),
    ),
)
def test_the_parser_and_the_schema_agree_on_arbitrary_input(kind: Any, value: object) -> None:
    """What the parser takes, an editor shows as valid; what is wrong raises RequestError and nothing else."""
    try:
        parsed = kind.parse(value)
    except RequestError:
        return
    assert kind.parse(str(parsed)) == parsed
    if isinstance(value, str) and value == value.strip() and " " not in value:
        assert Draft202012Validator(TypeAdapter(kind).json_schema()).is_valid(value)


@pytest.mark.parametrize(
    ("text", "size_bytes", "written"),
    [
        ("8Gi", 8 * 2**30, "8Gi"),
        ("1.5Gi", 1536 * 2**20, "1536Mi"),
        ("8G", 8 * 10**9, "8G"),
        ("1024", 1024, "1Ki"),
        ("0Gi", 0, "0"),
        (7, 7, "7"),
    ],
)
def test_sizes(text: object, size_bytes: int, written: str) -> None:
    assert Size.parse(text) == size_bytes
    assert str(Size.parse(text)) == written


@pytest.mark.parametrize(
    ("text", "seconds", "written"),
    [
        ("30s", 30.0, "30s"),
        ("90s", 90.0, "90s"),
        ("1.5h", 5400.0, "90m"),
        ("250ms", 0.25, "250ms"),
        ("2d", 172_800.0, "2d"),
        ("0s", 0.0, "0s"),
        ("0.0001s", 0.0001, "0.0001s"),
    ],
)
def test_durations(text: str, seconds: float, written: str) -> None:
    assert Duration.parse(text) == seconds
    assert str(Duration.parse(text)) == written


def test_ranges() -> None:
    assert Range.parse("1..4") == Range(1, 4)
    assert Range.parse("3") == Range.parse(3) == Range(3, 3)
    assert [count for count in range(6) if count in Range(1, 4)] == [1, 2, 3, 4]
    assert str(Range(3, 3)) == "3"


def test_gpus() -> None:
    assert Gpus.parse("L4:2") == Gpus(2, "L4")
    assert Gpus.parse("L4") == Gpus(1, "L4")
    assert Gpus.parse(2) == Gpus.parse("2") == Gpus(2)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Range, "4..1", "upside down; write 1..4"),
        (Range, -1, "within 0..1000000000"),
        (Range, "1-4", "write LOW..HIGH such as 1..4"),
        (Range, True, "not a range"),
        (Range, 1.0, "not a range"),
        (Range, "9" * 5000, "not a range"),
        (Size, "8gib", "did you mean 8Gi?"),
        (Size, "8{x}", "no such unit '{x}'"),
        (Size, "8X", "no such unit 'X', only Ti, T, Gi"),
        (Size, "0.3", "not a whole number of bytes"),
        (Size, -1, "from 0 to"),
        (Size, "99999999Ti", "from 0 to"),
        (Size, True, "not a size"),
        (Size, 1.5, "not a size"),
        (Duration, 30, "needs a unit; write 30s"),
        (Duration, "30", "a number and ms, s, m, h or d"),
        (Duration, "-1s", "not a duration"),
        (Duration, "40000d", "100 years"),
        (Duration, True, "not a duration"),
        (Gpus, 0, "at least 1 GPU"),
        (Gpus, "L4:0", "at least 1 GPU"),
        (Gpus, "L4:many", "KIND:COUNT"),
        (Gpus, True, "not GPUs"),
    ],
)
def test_wrong_values_say_what_to_write(kind: Any, value: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        kind.parse(value)
    assert message in str(caught.value)
    with pytest.raises(ValidationError) as wrapped:  # the same words inside a model
        TypeAdapter(kind).validate_python(value)
    assert str(caught.value) in str(wrapped.value)


def test_no_duration_is_nan_or_infinite() -> None:
    for seconds in (float("nan"), float("inf"), -0.1):
        with pytest.raises(RequestError, match="from 0s"):
            Duration(seconds)


def test_values_are_immutable_and_plain_in_json() -> None:
    with pytest.raises(AttributeError):
        Range(1, 2).min = 5  # type: ignore[misc]
    assert json.dumps([Size(1024), Duration(1.5)]) == "[1024, 1.5]"
    assert repr(Size(2**30)) == "Size('1Gi')"
    assert repr(Duration(30)) == "Duration('30s')"
