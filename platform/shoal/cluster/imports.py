"""What workers import ahead of need: torch, Ray Train, and the libraries that earlier runs of the cluster imported.

The template of all workers (`template`) imports this once, before the first worker. What runs add later, its
successor imports beside them, mostly while one trains on every core. At normal priority 4 CPU-seconds of imports cost
a run 40 % of its speed while they last, at nice 15 still 30 %, in SCHED_IDLE a sixth (2 cores, gloo, 2026-11): a
worker that waited for its peer then has its core back at once, though not its caches. So a successor imports in a
thread of that class. On cores that are never idle it is promoted after a while, or the successor would never serve.

A recipe imports what it needs when it builds its data or model; scikit-learn takes a second for that, others five.
A process that replaces a worker in the middle of a run has that behind it. Libraries only: code of the project,
which may change from one run to the next, is imported when it is needed.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import sys
import sysconfig
import threading
from pathlib import Path

from shoal.cluster.info import run_dir_of
from shoal.cluster.processes import CLUSTER_ID
from shoal.errors import NotFoundError, ShoalError
from shoal.storage import read_json, write_json

TORCH = ("torch", "torch._dynamo")
MODULES = (*TORCH, "shoal.train.workers")
"""The last one imports all that a controller or training worker of a run needs, Ray Train's modules too. torch
imports torch._dynamo late, with the first seed or optimizer: the first trial in a process took 1.11 CPU-s, the
second 0.05 (2026-11)."""

_PROMOTED_AFTER_S = 30.0
_RLIMIT_NICE_OF_0 = 20
"""What RLIMIT_NICE must be for a thread to come back to nice 0 (setrlimit(2)); root needs none."""
_NAME = "imports.json"
_MAX_NAMES = 10_000
_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for kind in ("stdlib", "purelib", "platlib")
    for folder in (sysconfig.get_path(kind), Path(sysconfig.get_path(kind)).resolve())
)
"""As they are named and where they are: a virtual environment may be a link."""

logger = logging.getLogger(__name__)


def remember_imports() -> None:
    """Note what this worker process has imported from libraries; does nothing outside a cluster of shoal's.

    Best effort: without it everything works, slower; a failure is logged.
    """
    if (path := _path()) is None:
        return
    names = [name for name, module in list(sys.modules.items()) if _is_of_a_library(name, module)]
    try:
        known = _read(path)
        if new := sorted(set(names) - set(known)):
            write_json(path, [*known, *new][:_MAX_NAMES])  # other recipes' stay
    except ShoalError:
        logger.warning("could not note what runs import", exc_info=True)


def import_now(only: tuple[str, ...] | None = None) -> None:
    """Import it all, or ``only`` these, at this process's priority; what cannot be imported is left out."""
    path = _path()
    for name in only or (*MODULES, *(_read(path) if path else ())):
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # it was there under circumstances of its own; whoever needs it will say so
                logger.warning("could not import %s ahead of need", name, exc_info=True)


def import_behind_others() -> None:
    """Import in a thread that gives way, and wait for it; what runs later runs at the usual priority."""
    thread = threading.Thread(target=_give_way_and_import, name="shoal-imports")
    thread.start()
    thread.join(_PROMOTED_AFTER_S)
    if thread.is_alive() and _may_be_promoted():
        os.sched_setscheduler(thread.native_id or 0, os.SCHED_OTHER, os.sched_param(0))
    thread.join()


def last_change() -> float | None:
    """When a run last added to what is remembered, in seconds since the epoch; None before the first."""
    path = _path()
    try:
        return path.stat().st_mtime if path else None
    except OSError:
        return None


def _give_way_and_import() -> None:
    if _may_be_promoted():
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
    else:  # nobody could take it out of SCHED_IDLE again, and there it might never end
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # Linux: of this thread alone
    import_now()


def _may_be_promoted() -> bool:
    return os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_NICE)[0] >= _RLIMIT_NICE_OF_0


def _path() -> Path | None:
    cluster_id = os.environ.get(CLUSTER_ID)
    return run_dir_of(cluster_id) / _NAME if cluster_id else None


def _read(path: Path) -> list[str]:
    try:
        names = read_json(path)
    except NotFoundError:
        return []
    except ShoalError:
        logger.warning("%s is damaged; it is written anew", path)
        return []
    return [name for name in names if isinstance(name, str)][:_MAX_NAMES] if isinstance(names, list) else []


def _is_of_a_library(name: str, module: object) -> bool:
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    return name != "__main__" and isinstance(origin, str) and origin.startswith(_LIBRARIES)
