"""Append-only text files that survive a writer killed in the middle of a line.

A line counts once its newline is there. A writer that finds the file without one at its end closes the torn
line with ASCII CAN ("what precedes is in error"), which no JSON text contains, so that readers drop it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from shoal.errors import RequestError
from shoal.storage.disk import FILE_MODE, make_directories, read_plain, storage_error

MAX_LINE_BYTES = 2**20
MAX_LINES_BYTES = 256 * 2**20
"""Of a whole file that `read_lines` reads; the trials of a sweep take some megabytes at most."""
_CANCEL = b"\x18"


def append_line(path: Path, line: str, *, sync: bool = False) -> None:
    """Add ``line`` at the end of ``path``, creating it, whole and in one write.

    Lines of several processes do not mix. ``sync`` waits until the disk has it; without it a power cut (not
    a kill) may lose the line.

    Raises:
        RequestError: the line has more than `MAX_LINE_BYTES`, a newline or a CAN character.
        StorageError: the disk is full, read-only or gone; readers ignore what was written of the line.
    """
    content = line.encode() + b"\n"
    if len(content) > MAX_LINE_BYTES:
        raise RequestError(f"a line of {len(content)} bytes for {path}; at most {MAX_LINE_BYTES} are kept")
    if b"\n" in content[:-1] or _CANCEL in content:
        raise RequestError(f"a line for {path} with a newline or a control character in it: {line[:80]!r}")
    try:
        descriptor = _open(path)
        try:
            size_bytes = os.fstat(descriptor).st_size
            # When another process is in the middle of its write, the CAN lands behind its newline: harmless.
            if size_bytes and os.pread(descriptor, 1, size_bytes - 1) != b"\n":
                content = _CANCEL + b"\n" + content
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, "only a part of the line was written", str(path))
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_error("append to", path, error) from error


def read_lines(path: Path) -> list[str]:
    """All whole lines of ``path``, without their newlines; none when there is no such file.

    Torn lines are left out, the one at the end included; bytes that are not UTF-8 show as U+FFFD.

    Raises:
        CorruptError: it is no plain file, or absurdly large.
        StorageError: the file cannot be read.
    """
    try:
        content = read_plain(path, max_bytes=MAX_LINES_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error("read", path, error) from error
    lines = content.split(b"\n")[:-1]  # what follows the last newline is torn, or still being written
    return [line.decode(errors="replace") for line in lines if _is_intact(line)]


def _is_intact(line: bytes) -> bool:
    return bool(line) and not line.endswith(_CANCEL) and len(line) < MAX_LINE_BYTES


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags, FILE_MODE)
    except FileNotFoundError:
        make_directories(path.parent)
        return os.open(path, flags, FILE_MODE)
