"""Where a process stands: the stacks of its threads, whether it answers or not, in the format of `faulthandler`."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import stat
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_SIGNAL = signal.SIGUSR1
_MAX_BYTES = 64 * 2**10
_FRAME = re.compile(r'^  File "(?P<path>.*)", line (?P<line>\d+) in (?P<name>.*)$', flags=re.M)


@contextmanager
def dumps_on_signal() -> Iterator[None]:
    """While inside, SIGUSR1 makes this process write its stacks to standard error.

    Also while native code holds the interpreter's lock, and in a process that was just woken by SIGCONT.
    """
    faulthandler.register(_SIGNAL, file=2, all_threads=True)
    try:
        yield
    finally:
        faulthandler.unregister(_SIGNAL)


def dump() -> str:
    """The stacks of this process; written to standard error, too."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read(_MAX_BYTES).decode(errors="replace")
    print(text, file=sys.stderr, flush=True)
    return text


def dump_by_signal(pid: int, *, timeout_s: float) -> str:
    """Make a process of this machine that does not answer write its stacks, and read them back.

    Wakes it if it was stopped. Empty where nothing came within ``timeout_s``, where its standard error is no file,
    and for a process that is not within `dumps_on_signal`: the signal would end it.
    """
    try:
        with open(f"/proc/{pid}/fd/2", "rb") as log:
            if not stat.S_ISREG(os.fstat(log.fileno()).st_mode) or not _catches_signal(pid):
                return ""
            begin = os.fstat(log.fileno()).st_size
            deaf = _threads_that_block(pid)
            os.kill(pid, _SIGNAL)
            os.kill(pid, signal.SIGCONT)
            deadline = time.monotonic() + timeout_s
            # Pending until a thread takes it; the kernel blocks it in that thread until all is written.
            while time.monotonic() < deadline and (
                os.fstat(log.fileno()).st_size == begin
                or _has_signal(f"/proc/{pid}/status", "ShdPnd:")
                or _threads_that_block(pid) - deaf
            ):
                time.sleep(0.02)
            log.seek(begin)
            return log.read(_MAX_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _catches_signal(pid: int) -> bool:
    return _has_signal(f"/proc/{pid}/status", "SigCgt:")


def _threads_that_block(pid: int) -> set[str]:
    folder = f"/proc/{pid}/task"
    return {thread for thread in os.listdir(folder) if _has_signal(f"{folder}/{thread}/status", "SigBlk:")}


def _has_signal(status: str, field: str) -> bool:
    """Whether that set of signals, a field of proc(5), has ours; of a thread that has ended, none has."""
    with suppress(FileNotFoundError, ProcessLookupError), open(status) as file:
        mask = next((line.split()[1] for line in file if line.startswith(field)), "0")
        return bool(int(mask, 16) >> (_SIGNAL - 1) & 1)
    return False


def stack_of(dumped: str, thread: int) -> str:
    """One thread's part of what was dumped, innermost call first; all of it if that thread is not there."""
    parts = re.split(r"^(?=(?:Current thread|Thread) 0x)", dumped, flags=re.M)
    return next((part for part in parts if f"hread {thread:#018x} " in part), dumped).strip()


def place_of(stack: str) -> str:
    """Where a stack stands, as in ``model.py:12 in loss``: innermost in code that is no library, else in torch or the
    like, else anywhere. Empty for an empty stack."""
    frames = [(match["path"], match["line"], match["name"]) for match in _FRAME.finditer(stack)]
    libraries = {
        name: os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "purelib", "platlib")
    }
    ours = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")

    def is_stock(path: str) -> bool:
        is_installed = path.startswith((libraries["purelib"], libraries["platlib"]))
        return path.startswith(("<frozen", libraries["stdlib"])) and not is_installed

    def is_library(path: str) -> bool:
        return is_stock(path) or path.startswith((libraries["purelib"], libraries["platlib"], ours))

    choices = [
        *(frame for frame in frames if not is_library(frame[0])),
        *(frame for frame in frames if not is_stock(frame[0])),
        *frames,
    ]
    return next((f"{os.path.basename(path)}:{line} in {name}" for path, line, name in choices), "")
