"""Where a process stands, asked and by signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from projects import ROOT
from shoal.train.stacks import dump, dump_by_signal, place_of, stack_of
from waiting import wait_until

STUCK = """
import threading
from contextlib import nullcontext
from shoal.train.stacks import dumps_on_signal

def wait_for_ever():
    with {around}:
        print("ready", flush=True)
        threading.Event().wait()

wait_for_ever()
"""


def stuck(tmp_path: Path, around: str) -> subprocess.Popen[str]:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.format(around=around))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
        )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    asleep = psutil.STATUS_SLEEPING
    wait_until(lambda: psutil.Process(process.pid).status() == asleep, "it has gone on from print to wait")
    return process


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_a_stopped_process_says_where_it_stands(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    started.append(process := stuck(tmp_path, "dumps_on_signal()"))
    process.send_signal(signal.SIGSTOP)
    text = dump_by_signal(process.pid, timeout_s=10)
    assert place_of(stack_of(text, 0)) == "stuck.py:9 in wait_for_ever"
    assert text == (tmp_path / "log").read_text()


def test_a_process_that_the_signal_would_end_is_left_alone(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    started.append(process := stuck(tmp_path, "nullcontext()"))
    assert dump_by_signal(process.pid, timeout_s=0.1) == ""
    assert process.poll() is None


def test_a_process_that_is_gone_says_nothing(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    started.append(process := stuck(tmp_path, "nullcontext()"))
    process.kill()
    process.wait()
    assert dump_by_signal(process.pid, timeout_s=0.1) == ""


def test_one_threads_stack_is_found_among_all(capfd: pytest.CaptureFixture[str]) -> None:
    lock = threading.Lock()
    lock.acquire()

    def deadlock_here() -> None:
        with lock:
            pass

    thread = threading.Thread(target=deadlock_here, daemon=True)
    thread.start()
    assert thread.ident is not None
    wait_until(lambda: place_of(stack_of(dump(), thread.ident or 0)).endswith("in deadlock_here"), dump)
    whole = dump()
    mine = stack_of(whole, thread.ident)
    assert "test_one_threads_stack" in whole
    assert "test_one_threads_stack" not in mine
    assert place_of(mine) == f"test_stacks.py:{deadlock_here.__code__.co_firstlineno + 1} in deadlock_here"
    assert capfd.readouterr().err.count("deadlock_here") >= 2
    lock.release()
    thread.join()


def test_without_code_of_the_users_the_nearest_library_is_named() -> None:
    import torch

    data = Path(torch.__file__).parent / "utils" / "data" / "dataloader.py"
    stack = (
        f'Thread 0x1 (most recent call first):\n  File "{threading.__file__}", line 3 in wait\n'
        f'  File "{data}", line 12 in _next_data\n'
        f'  File "{ROOT}/platform/shoal/train/session.py", line 5 in batches\n'
    )
    assert place_of(stack) == "dataloader.py:12 in _next_data"
    assert place_of(stack + f'  File "{ROOT}/demo/digits.py", line 7 in train\n') == "digits.py:7 in train"
    assert place_of("") == ""
