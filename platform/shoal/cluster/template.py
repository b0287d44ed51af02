"""The template: a process that has imported what workers need, of which the cluster's workers are forked.

A worker process takes 4 CPU-seconds to import torch and Ray Train, a fork 0.02. So a worker is there a moment
after it is asked for, spare processes need not wait in numbers (each idle one costs a run 0.7 % of a core, Ray's
own ticks), and all share their libraries' memory.

What makes forking safe here: the template has one thread of its own when it forks (libraries that keep a pool, such
as OpenBLAS and jemalloc, bring handlers for forks), has opened no connection, has not touched a GPU or a generator
of random ids, and imports nothing but libraries and shoal. Copies that try all this go first (`is_fit`): a template
that is not fit ends, and workers then start as Ray starts them. A request whose environment differs in a variable
that libraries may read as they load is refused, and its worker starts so, too.

When runs have imported more libraries (`imports`), the template forks a successor that imports those, behind
whatever else runs, and then takes over. It ends with the raylet that it starts workers for.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import resource
import runpy
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from shoal.cluster import imports, ray_edge

_TICK_S = 2.0
_REQUEST_TIMEOUT_S = 5.0
_PROBE_TIMEOUT_S = 60
_MAX_REQUEST_BYTES = 16 << 20
_NO_RAYLET_S = 300.0
"""How long the template stays when no raylet has ever asked: Ray did not start."""
_RAYLET = "RAY_RAYLET_PID"
_JOB, _ANY_JOB = "RAY_JOB_ID", "ffffffff"
"""A worker that was started for no job in particular takes the id of the first one that it works for."""
_FREE_TO_DIFFER = frozenset(
    {
        _JOB,
        "RAY_CLIENT_MODE",
        "RAY_LD_PRELOAD_ON_WORKERS",
        "RAY_RUNTIME_ENV_CREATE_WORKING_DIR",
        "PYTHONPATH",
        "PWD",
        "OLDPWD",
        "SHLVL",
        "_",
        "LC_CTYPE",
    }
)
"""Variables that no library reads as it loads; PYTHONPATH is carried out by hand."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A worker to become: its command line, environment, folder, niceness, limit of open files and streams."""

    argv: list[str]
    environment: dict[str, str]
    cwd: str
    niceness: int
    open_files: int
    streams: tuple[int, int, int]


def bind(path: str) -> socket.socket:
    """Listen at ``path``, whose folder only this user may enter."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(128)
    return listener


class Template:
    """Forks workers for whoever connects to ``listener``. Make it before anything else is imported.

    `serve` returns in this process when its raylet has ended or a successor serves, and in each copy at once.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._environment = dict(os.environ)
        self._path = list(sys.path)
        self._raylet: int | None = None
        self._stays_until = time.monotonic() + _NO_RAYLET_S
        self._imported: float | None = None
        self._news: socket.socket | None = None

    def serve(self) -> Request | None:
        """What this copy is to become; None when this process is to end. Blocks meanwhile."""
        imports.import_now(imports.TORCH)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # copies that ended need nobody to ask after them
        while self._is_wanted():
            ready, _, _ = select.select([self._listener, *self._news_of_successor()], [], [], _TICK_S)
            if self._news in ready:
                if self._successor_serves():
                    return None
            elif self._listener in ready:
                if (request := self._answer_one()) is not None:
                    return request
            elif self._raylet and self._news is None and self._imported != imports.last_change():
                self._raise_successor()
        return None

    def adopt(self, request: Request) -> None:
        """Make this copy what the interpreter would be that began with ``request``, up to its first line."""
        self._listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for at, stream in enumerate(request.streams):
            os.dup2(stream, at)
            os.close(stream)
        # A group of its own, by which the raylet ends what a dead worker leaves behind; and a session, since the
        # kernel wakes and hangs up stopped processes of our session when we leave to a successor.
        os.setsid()
        os.chdir(request.cwd)
        os.setpriority(os.PRIO_PROCESS, 0, request.niceness)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        soft = request.open_files if hard == resource.RLIM_INFINITY else min(request.open_files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        by_imports = {name: value for name, value in os.environ.items() if name not in self._environment}
        os.environ.clear()
        os.environ.update(by_imports | request.environment)
        ours = {self._path[0], *_entries(self._environment)}
        script, *_ = sys.argv = request.argv
        sys.path[:] = [
            os.path.dirname(script),
            *_entries(request.environment),
            *(entry for entry in sys.path if entry not in ours),
        ]
        ray_edge.reread_settings()
        _part_random_numbers()

    def _is_wanted(self) -> bool:
        if self._raylet is None:
            return time.monotonic() < self._stays_until
        return _is_running(self._raylet)

    def _answer_one(self) -> Request | None:
        """Answer one connection; returns the request in the copy, and None here."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # a successor, or who it succeeds, was faster
            return None
        with connection:
            connection.settimeout(_REQUEST_TIMEOUT_S)
            try:
                request = _receive(connection)
            except (OSError, ValueError, TypeError):
                logger.exception("a request that cannot be read")
                return None
            if self._raylet is None and _RAYLET in request.environment:
                self._meet_raylet(request.environment[_RAYLET])
            if differing := self._differing(request.environment):
                logger.info("a worker starts by itself: %s differ", ", ".join(differing))
            elif _has_gone(connection):
                logger.warning("a worker started by itself, after it had waited too long")
            elif os.fork() == 0:
                return request
            else:
                with contextlib.suppress(OSError):
                    connection.sendall(b"+")
            for stream in request.streams:
                os.close(stream)
        return None

    def _meet_raylet(self, pid: str) -> None:
        """Import Ray, whose core reads the raylet's and the job's id once, as it is loaded."""
        self._raylet = int(pid)
        self._environment[_RAYLET] = os.environ[_RAYLET] = pid
        os.environ[_JOB] = self._environment[_JOB] = _ANY_JOB
        self._imported = imports.last_change()
        with ray_edge.random_ids_untouched():
            imports.import_now()
        gc.collect()
        gc.freeze()  # a collector that marks what all copies share would copy every page
        if not is_fit():
            raise SystemExit("workers are not forked: the template is not fit for it")

    def _differing(self, environment: dict[str, str]) -> list[str]:
        """Variables of that environment that libraries may have read here with another value."""
        names = {*environment, *self._environment} - _FREE_TO_DIFFER
        return sorted(name for name in names if environment.get(name) != self._environment.get(name))

    def _news_of_successor(self) -> list[socket.socket]:
        return [self._news] if self._news is not None else []

    def _successor_serves(self) -> bool:
        assert self._news is not None
        with self._news as news:
            self._news = None
            return news.recv(1) == b"+"

    def _raise_successor(self) -> None:
        """Fork a template that imports what is new, behind whatever else runs, and then serves in our place."""
        self._imported = imports.last_change()
        self._news, ours = socket.socketpair()
        if os.fork() != 0:
            ours.close()
            return
        self._news.close()
        self._news = None
        with ours:
            with ray_edge.random_ids_untouched():
                imports.import_behind_others()
            if not is_fit():
                logger.error("more libraries are not imported ahead: the template would not be fit for it")
                os._exit(1)
            ours.sendall(b"+")


def is_fit() -> bool:
    """Whether copies of this process can compute, and draw ids of their own. Blocks for a moment."""
    if threading.active_count() != 1:
        logger.error("threads here: %s", ", ".join(thread.name for thread in threading.enumerate()))
        return False
    first, second = _try_copy(), _try_copy()
    if not first or not second:
        logger.error("a copy could not compute")
    elif first == second:
        logger.error("two copies drew the same random id")
    return bool(first and second and first != second)


def _try_copy() -> bytes:
    """A random id that a copy of this process has drawn after it computed something; empty if it could not."""
    result, ours = socket.socketpair()
    if os.fork() != 0:
        ours.close()
        with result:
            result.settimeout(_PROBE_TIMEOUT_S)
            with contextlib.suppress(TimeoutError):
                return result.recv(64)
            return b""
    try:
        signal.alarm(_PROBE_TIMEOUT_S)
        if _computes():
            ours.sendall(ray_edge.random_id())
    finally:
        os._exit(0)


def _computes() -> bool:
    import numpy as np
    import torch

    ones = torch.ones(64, 64, requires_grad=True)
    torch.autograd.backward((ones @ ones).sum())
    # In a copy of a process that touched the driver no GPU can be used.
    has_gpu_state = torch.cuda._is_in_bad_fork()
    return not has_gpu_state and bool((np.ones((64, 64)) @ np.ones((64, 64))).sum() == 64**3)


def run(request: Request) -> None:
    """Run the worker's script as the interpreter would."""
    runpy.run_path(request.argv[0], run_name="__main__")


def main(fd: int) -> None:
    """Serve on the listening socket with that number."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s template: %(message)s")
    template = Template(socket.socket(fileno=fd))
    request = template.serve()
    if request is not None:
        template.adopt(request)
        logging.getLogger().handlers.clear()
        run(request)


def _receive(connection: socket.socket) -> Request:
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    try:
        stdin, stdout, stderr = streams
        size = int.from_bytes(head, "big")
        if size > _MAX_REQUEST_BYTES:
            raise ValueError(f"a request of {size} bytes")
        with connection.makefile("rb") as body:
            return Request(**json.loads(body.read(size)), streams=(stdin, stdout, stderr))
    except BaseException:
        for stream in streams:
            os.close(stream)
        raise


def _has_gone(connection: socket.socket) -> bool:
    """Whether whoever asked has hung up: then nobody must become what it asked for, a second time."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def _entries(environment: dict[str, str]) -> list[str]:
    return [os.path.abspath(part) for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]


def _part_random_numbers() -> None:
    """What copies would otherwise draw alike; Python's own generator is seeded anew at every fork."""
    import multiprocessing

    import numpy as np

    np.random.seed(int.from_bytes(os.urandom(4), "big"))
    multiprocessing.current_process().authkey = os.urandom(32)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]))
