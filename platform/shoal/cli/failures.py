"""What a person sees of an error, and the exit code a script sees.

0 all is well; 2 the request is impossible, fix it (`RequestError`, and wrong options); 1 the machines failed us,
try again (`EnvironmentFailure`); 70 a bug; 130 and 143 ended by Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.errors import EnvironmentFailure, RecipeError, RequestError, ShoalError

TRACEBACK_ENV = "SHOAL_TRACEBACK"
"""Set to 1, every error shows its whole traceback."""
MAX_TRACEBACK_LINES = 24

IMPOSSIBLE, FAILED, BUG, INTERRUPTED, TERMINATED = 2, 1, 70, 130, 143

_LIBRARY = str(Path(__file__).resolve().parents[1])


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: the same as Ctrl-C, but for the exit code."""


@contextmanager
def reported_failures() -> Iterator[None]:
    """Turn errors into a message on standard error and an exit code, without a traceback."""
    try:
        yield
    except (BrokenPipeError, SystemExit):
        raise  # `shoal runs | head` is no failure; click ends quietly
    except KeyboardInterrupt as err:
        raise SystemExit(TERMINATED if isinstance(err, Terminated) else INTERRUPTED) from None
    except Exception as err:
        if type(err).__module__.startswith(("click", "typer")):
            raise  # wrong options, and typer's own way to exit
        sys.stdout.flush()
        print(message_of(err), file=sys.stderr, flush=True)
        raise SystemExit(exit_code_of(err)) from None


def exit_code_of(err: Exception) -> int:
    """The exit code for an error."""
    if isinstance(err, RequestError):
        return IMPOSSIBLE
    return FAILED if isinstance(err, EnvironmentFailure) else BUG


def message_of(err: Exception) -> str:
    """An error as text for a person."""
    if os.environ.get(TRACEBACK_ENV, "0") not in ("", "0"):
        return "".join(traceback.format_exception(err)).rstrip()
    if not isinstance(err, RequestError | EnvironmentFailure):
        text = str(err).splitlines()[0] if str(err) else ""
        kind = "" if isinstance(err, ShoalError) else f"{type(err).__name__}: "
        return f"error: {kind}{text}\nThis is a bug in shoal; set {TRACEBACK_ENV}=1 to see the traceback."
    text = f"error: {err}"
    if isinstance(err, RecipeError) and (lines := short_traceback(err.traceback_text)):
        framed = "\n".join(f"  | {line}" for line in lines)
        head, newline, rest = text.partition("\n")
        return f"{head}\n{framed}{newline}{rest}"
    return text


def short_traceback(text: str) -> list[str]:
    """The recipe's part of a traceback: without frames of shoal itself, and the last lines of a long one."""
    kept: list[str] = []
    skipping, has_own = False, False
    for line in text.rstrip().splitlines():
        if line.startswith('  File "'):
            skipping = line.startswith(f'  File "{_LIBRARY}')
            has_own |= not skipping and "site-packages" not in line
        elif not line.startswith("    "):
            skipping = False
        if not skipping:
            kept.append(line)
    if not has_own:  # it was raised by us, about the recipe: the message says it all
        return []
    if len(kept) > MAX_TRACEBACK_LINES:
        kept = [kept[0], "  ...", *kept[-MAX_TRACEBACK_LINES:]]
    return kept
