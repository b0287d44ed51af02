"""Type a command and look at what it leaves behind."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Shoal = Callable[..., Outcome]


def type_command(*words: str) -> Outcome:
    """Run ``shoal WORDS...`` in this process."""
    from shoal.cli.app import app

    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    path = list(sys.path)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            app(list(words), prog_name="shoal")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.path[:] = path
    return Outcome(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))
