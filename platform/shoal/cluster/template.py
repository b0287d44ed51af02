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
from collections.abc import Callable
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
"""Variables that no library reads as it loads; but PYTHONPATH, which is carried out by hand, RAY_JOB_ID, for which
see `_ANY_JOB`, and RAY_CLIENT_MODE, which Ray itself sets as it is imported."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A worker to become: its command line, environment, folder, limits and streams."""

    argv: list[str]
    environment: dict[str, str]
    cwd: str
    niceness: int
    open_files: int
    oom_score_adj: str
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
        """A descriptor that is readable once the raylet has ended."""
        self._stays_until = time.monotonic() + _NO_RAYLET_S
        self._num_threads = 0
        self._imported: float | None = None
        self._news: socket.socket | None = None

    def serve(self) -> Request | None:
        """What this copy is to become; None when this process is to end. Blocks meanwhile."""
        imports.import_now(imports.TORCH)
        while self._raylet is not None or time.monotonic() < self._stays_until:
            watched = [item for item in (self._listener, self._news, self._raylet) if item is not None]
            ready, _, _ = select.select(watched, [], [], _TICK_S)
            if self._raylet in ready or (self._news in ready and self._successor_serves()):
                return None
            if self._listener in ready and (request := self._answer_one()) is not None:
                return request
            if self._raylet is not None and self._news is None and self._imported != imports.last_change():
                self._raise_successor()
        return None

    def adopt(self, request: Request) -> None:
        """Make this copy what the interpreter would be that began with ``request``, up to its first line."""
        self._listener.close()
        if self._news is not None:
            self._news.close()
        if self._raylet is not None:
            os.close(self._raylet)
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
        with contextlib.suppress(OSError):  # less than the template's needs a privilege
            Path("/proc/self/oom_score_adj").write_text(request.oom_score_adj)
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

    def _become(self, request: Request, connection: socket.socket) -> None:
        """Adopt it in a copy and say so; a copy that cannot, or of which nobody waits to hear, ends.

        Whoever asked and hears nothing starts the worker by itself: it must not be there twice.
        """
        try:
            self.adopt(request)
            connection.sendall(b"+")
        except BrokenPipeError:  # whoever asked has started the worker by itself
            os._exit(1)
        except BaseException:
            logger.exception("a copy could not become a worker")
            os._exit(1)

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
            except (OSError, ValueError, TypeError, AttributeError):
                logger.exception("a request that cannot be read")
                return None
            if self._raylet is None and _RAYLET in request.environment:
                self._meet_raylet(request.environment[_RAYLET])
            if differing := self._differing(request.environment):
                logger.info("a worker starts by itself: %s differ", ", ".join(differing))
            elif _fork() == 0:
                self._become(request, connection)
                return request
            for stream in request.streams:
                os.close(stream)
        return None

    def _meet_raylet(self, pid: str) -> None:
        """Import Ray, whose core reads the raylet's and the job's id once, as it is loaded."""
        self._raylet = os.pidfd_open(int(pid))
        self._environment[_RAYLET] = os.environ[_RAYLET] = pid
        os.environ[_JOB] = self._environment[_JOB] = _ANY_JOB
        self._imported = imports.last_change()
        _import(imports.import_now)
        if not is_fit():
            raise SystemExit("workers are not forked: the template is not fit for it")
        self._num_threads = _num_native_threads()  # of the libraries that are known to survive it

    def _differing(self, environment: dict[str, str]) -> list[str]:
        """Variables of that environment that libraries may have read here with another value."""
        names = {*environment, *self._environment} - _FREE_TO_DIFFER
        return sorted(name for name in names if environment.get(name) != self._environment.get(name))

    def _successor_serves(self) -> bool:
        assert self._news is not None
        with self._news as news:
            self._news = None
            return news.recv(1) == b"+"

    def _raise_successor(self) -> None:
        """Fork a template that imports what is new, behind whatever else runs, and then serves in our place."""
        self._imported = imports.last_change()
        news, ours = socket.socketpair()
        pid = _fork()
        if pid is None:
            news.close()
            ours.close()
            return
        if pid != 0:
            ours.close()
            self._news = news
            return
        news.close()
        with ours:
            _import(imports.import_behind_others)
            if not is_fit() or _num_native_threads() > self._num_threads:
                logger.error("more libraries are not imported ahead: one has threads, or the like")
                os._exit(1)
            ours.sendall(b"+")


def _import(do: Callable[[], None]) -> None:
    """Import what copies will share, as if nothing was special here, and put it out of the collector's reach."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # for modules that run a program as they load
    with ray_edge.random_ids_untouched():
        do()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # copies that ended need nobody to ask after them
    gc.collect()
    gc.freeze()  # a collector that marks what all copies share would copy every page


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
    except BaseException:
        logger.exception("a copy could not compute")
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
    root = logging.getLogger()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s template: %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    request = Template(socket.socket(fileno=fd)).serve()
    if request is not None:
        root.removeHandler(handler)
        root.setLevel(logging.WARNING)
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


def _fork() -> int | None:
    """As os.fork; None when there are no processes or no memory for one more."""
    try:
        return os.fork()
    except OSError:
        logger.exception("no copy can be made now")
        return None


def _entries(environment: dict[str, str]) -> list[str]:
    return [os.path.abspath(part) for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]


def _part_random_numbers() -> None:
    """What copies would otherwise draw alike; Python's own generator is seeded anew at every fork."""
    import multiprocessing

    import numpy as np

    np.random.seed()  # from the system
    multiprocessing.current_process().authkey = os.urandom(32)


def _num_native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
