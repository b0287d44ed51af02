"""Wait for a condition, with a deadline: the only way in which tests let time pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

DEADLINE_S = 120.0
"""For a machine with two cores that does other work too; where it is not reached, it costs nothing."""


def wait_until(
    condition: Callable[[], object],
    what: str | Callable[[], object],
    *,
    timeout_s: float = DEADLINE_S,
    every_s: float = 0.02,
) -> float:
    """Seconds until ``condition()`` was true; asked every ``every_s``, so that what it waits for has the CPU.

    Raises:
        AssertionError: not within ``timeout_s``; it says ``what``, or what ``what()`` says then.
    """
    began = time.monotonic()
    pause = threading.Event()
    while not condition():
        assert time.monotonic() - began < timeout_s, (
            f"not so after {timeout_s:g} s: {what() if callable(what) else what}"
        )
        pause.wait(every_s)
    return time.monotonic() - began
