"""What a worker prints, kept with its run: prints and tracebacks outlive the worker and the cluster."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.storage import is_full, make_directories

MAX_LOG_BYTES = 64 * 2**20
"""A rank's log that has grown beyond this starts anew at the next attempt; the old one is kept as ``.1``."""


def log_path(logs_dir: Path, rank: int) -> Path:
    """The file that holds what rank ``rank`` printed, over all attempts."""
    return logs_dir / f"rank-{rank}.log"


class _LossyFile(io.FileIO):
    """A file that drops what a full disk does not take: what a recipe prints is not worth its run."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except OSError as error:
            if not is_full(error):
                raise
            return memoryview(content).nbytes


def _lossy_stream(descriptor: int) -> io.TextIOWrapper:
    file = _LossyFile(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(file), line_buffering=True)


@contextmanager
def captured_output(path: Path) -> Iterator[None]:
    """Send this process's standard output and error to ``path`` (appended), native code's too.

    Put back on exit, because Ray gives the process other work afterwards.
    """
    make_directories(path.parent)
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    saved = {fd: os.dup(fd) for fd in (1, 2)}
    streams = sys.stdout, sys.stderr
    try:
        for fd in saved:
            os.dup2(log, fd)
        # Ray replaces Python's own streams in its workers; these two write straight to the descriptors.
        # Never closed: a logging handler made meanwhile may keep them.
        sys.stdout, sys.stderr = _lossy_stream(1), _lossy_stream(2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        for fd, original in saved.items():
            os.dup2(original, fd)
            os.close(original)
        os.close(log)
