"""Which libraries the cluster's runs import: waiting processes import them ahead of need, too (see `preload`).

A recipe imports what it needs when it builds its data or model; scikit-learn takes a second for that, others five. A
process that replaces a worker in the middle of a run has had it behind it then. Libraries only: code of the project,
which may change from one run to the next, is imported when it is needed.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import sysconfig
from pathlib import Path

from shoal.cluster.info import run_dir_of
from shoal.cluster.processes import CLUSTER_ID
from shoal.errors import NotFoundError, ShoalError
from shoal.storage import read_json, write_json

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


def import_remembered() -> None:
    """Import what runs of this cluster imported before, as far as it can be."""
    if (path := _path()) is None:
        return
    for name in _read(path):
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # it was there under circumstances of its own; whoever needs it will say so
                logger.debug("could not import %s ahead of need", name, exc_info=True)


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
