"""What every waiting worker process imports before it has work (see `warm`); importing this module does it.

The imports take 3.5 CPU-seconds, mostly while a run trains on every core. At normal priority they cost that run
40 % of its speed while they last, at nice 15 still 30 %, in SCHED_IDLE a sixth (2 cores, gloo, 2026-11): a worker
that waited for its peer then has its core back at once, though not its caches. So they run in a thread of that
class, late (`shoal.train.ray_edge`), and the process waits for the thread. On an idle core they are as fast as
ever; on one that is never idle they are promoted after a while, so that whoever was given this process does not
wait for ever.
"""

import importlib
import logging
import os
import resource
import threading

MODULES = ("torch", "torch._dynamo", "shoal.train.workers")
"""The last one imports all that a controller or training worker of a run needs, Ray Train's modules too. torch
imports torch._dynamo late, with the first seed or optimizer: the first trial in a process took 1.11 CPU-s, the
second 0.05 (2026-11)."""

_PROMOTED_AFTER_S = 30.0
_RLIMIT_NICE_OF_0 = 20
"""What RLIMIT_NICE must be for a thread to come back to nice 0 (setrlimit(2)); root needs none."""


def _import_modules() -> None:
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception:  # whoever needs it will say so; a process without it is only slower to start
            logging.getLogger(__name__).exception("could not import %s ahead of need", name)
    from shoal.cluster.imports import import_remembered

    import_remembered()


def _import_behind_others() -> None:
    """Import in a thread that gives way; its priority ends with it, and what runs later runs as usual."""
    thread = threading.Thread(target=_give_way_and_import, name="shoal-preload")
    thread.start()
    thread.join(_PROMOTED_AFTER_S)
    if thread.is_alive() and _may_be_promoted():
        os.sched_setscheduler(thread.native_id or 0, os.SCHED_OTHER, os.sched_param(0))
    thread.join()


def _give_way_and_import() -> None:
    if _may_be_promoted():
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
    else:  # nobody could take it out of SCHED_IDLE again, and there it might never end
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # Linux: of this thread alone
    _import_modules()


def _may_be_promoted() -> bool:
    return os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_NICE)[0] >= _RLIMIT_NICE_OF_0


# OpenBLAS makes its threads when numpy is imported, and threads inherit priority: so here, not behind others.
importlib.import_module("numpy")
_import_behind_others()
