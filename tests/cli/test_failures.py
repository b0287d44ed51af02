"""Errors as a person and a script see them."""

from __future__ import annotations

import traceback

import pytest

from shoal.cli.failures import Terminated, message_of, reported_failures, short_traceback
from shoal.errors import (
    EnvironmentFailure,
    InternalError,
    NotFoundError,
    RecipeError,
    RequestError,
    StorageError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("no"), 2),
        (NotFoundError("none"), 2),
        (EnvironmentFailure("gone"), 1),
        (StorageError("full"), 1),
        (InternalError("bug"), 70),
        (ZeroDivisionError("bug"), 70),
        (KeyboardInterrupt(), 130),
        (Terminated(), 143),
    ],
)
def test_each_family_of_errors_has_an_exit_code(error: BaseException, code: int) -> None:
    with pytest.raises(SystemExit) as end, reported_failures():
        raise error
    assert end.value.code == code


def test_the_users_error_is_a_message_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), reported_failures():
        raise RequestError("no such thing; choose another")
    shown = capsys.readouterr()
    assert shown.err == "error: no such thing; choose another\n"
    assert shown.out == ""


def test_a_bug_is_one_line_and_a_way_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_TRACEBACK", raising=False)
    assert message_of(ZeroDivisionError("by zero\nsecond line")) == (
        "error: ZeroDivisionError: by zero\nThis is a bug in shoal; set SHOAL_TRACEBACK=1 to see the traceback."
    )


def test_the_whole_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_TRACEBACK", "1")
    with pytest.raises(RequestError) as raised:
        raise RequestError("no")
    assert "Traceback (most recent call last)" in message_of(raised.value)


def raise_in_users_code() -> None:
    raise ValueError("shapes do not fit")


def test_the_recipes_own_traceback_is_framed_between_message_and_advice() -> None:
    try:
        raise_in_users_code()
    except ValueError:
        text = traceback.format_exc()
    lines = message_of(
        RecipeError("run x failed\n  full text: shoal logs x", traceback_text=text)
    ).splitlines()
    assert lines[0] == "error: run x failed"
    assert all(line.startswith("  | ") for line in lines[1:-1])
    assert "  | ValueError: shapes do not fit" in lines
    assert lines[-1] == "  full text: shoal logs x"


def test_frames_of_shoal_are_left_out_of_a_recipes_traceback() -> None:
    import shoal.recipe

    text = "\n".join(
        [
            "Traceback (most recent call last):",
            f'  File "{shoal.recipe.__file__}", line 1, in load',
            "    inner()",
            "    ^^^^^^^",
            '  File "/home/me/recipe.py", line 7, in loss',
            "    wrong()",
            "NameError: wrong",
        ]
    )
    assert short_traceback(text) == [
        "Traceback (most recent call last):",
        '  File "/home/me/recipe.py", line 7, in loss',
        "    wrong()",
        "NameError: wrong",
    ]


def test_a_long_traceback_keeps_its_end() -> None:
    frames = [
        line for i in range(100) for line in (f'  File "/home/me/recipe.py", line {i}, in f', "    f()")
    ]
    text = "\n".join(["Traceback (most recent call last):", *frames, "the end"])
    shown = short_traceback(text)
    assert len(shown) < 30
    assert shown[-1] == "the end"


def test_without_a_frame_of_the_recipe_the_message_stands_alone() -> None:
    text = (
        "Traceback (most recent call last):\n"
        '  File "/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 2638, in load_state_dict\n'
        "RuntimeError: size mismatch"
    )
    assert (
        message_of(RecipeError("the weights do not fit", traceback_text=text))
        == "error: the weights do not fit"
    )
