"""SIGTERM (``ray job stop``, a machine that shuts down) ends a command as gracefully as Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from shoal.cli.failures import Terminated


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise `Terminated`, a KeyboardInterrupt, where SIGTERM arrives. For the main thread."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
