"""Where things are in the storage folder."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import RequestError
from shoal.storage.disk import (
    LOCAL_DISK,
    Disk,
    free_bytes,
    make_directories,
    nearest_existing,
    size_text,
    storage_error,
)
from shoal.storage.owner import temporary_path

MIN_FREE_BYTES = 128 * 2**20
"""Below this much free space nothing new is started: logs, journals and MLflow's database need some too."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")


@dataclass(frozen=True)
class Storage:
    """The folder that ``storage:`` in cluster.yaml names. Making one touches nothing."""

    root: Path

    @property
    def runs_dir(self) -> Path:
        return self.root / "runs"

    @property
    def models_dir(self) -> Path:
        return self.root / "models"

    @property
    def sweeps_dir(self) -> Path:
        return self.root / "sweeps"

    @property
    def app_logs_dir(self) -> Path:
        """What replicas print: ``replica_<app>_...log`` files, kept when the cluster is gone."""
        return self.root / "apps" / "logs"

    @property
    def tracking_dir(self) -> Path:
        return self.root / "tracking"

    def run_dir(self, name: str) -> Path:
        """Raises RequestError when ``name`` could not be the name of a run."""
        return self.runs_dir / check_name("run", name)

    def sweep_dir(self, name: str) -> Path:
        """Raises RequestError when ``name`` could not be the name of a sweep."""
        return self.sweeps_dir / check_name("sweep", name)

    def model_dir(self, model: str, version: int) -> Path:
        """Raises RequestError when ``model`` could not be the name of a model."""
        return self.models_dir / check_name("model", model) / str(int(version))

    def check(self, *, disk: Disk = LOCAL_DISK) -> None:
        """Create the folder if needed, and prove that it can be written and has room.

        Raises:
            StorageError: it is not a folder, not writable, or has less than `MIN_FREE_BYTES` free.
        """
        try:
            make_directories(self.root, disk)
        except OSError as error:
            raise storage_error("use the storage folder", self.root, error) from error
        self.probe(disk=disk)

    def probe(self, *, disk: Disk = LOCAL_DISK) -> None:
        """As `check`, and leave everything as it is: a folder that does not exist is tried by the one above it.

        Raises:
            StorageError: as `check`.
        """
        folder = nearest_existing(self.root)
        file = temporary_path(folder / "probe")
        try:
            if (free := free_bytes(folder)) < MIN_FREE_BYTES:
                needed = f"only {size_text(free)} free, shoal needs {size_text(MIN_FREE_BYTES)}"
                raise OSError(errno.ENOSPC, needed, str(self.root))
            disk.write_file(file, os.urandom(512))
            disk.remove(file)
        except OSError as error:
            raise storage_error("use the storage folder", self.root, error) from error


def is_name(name: object) -> bool:
    """Whether ``name`` may name a run, a sweep or a model: a folder's name on any disk, and one in MLflow."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(kind: str, name: str) -> str:
    """``name``, if it may name a ``kind`` (``run``, ``sweep``, ``model``).

    Raises:
        RequestError: it may not; the message says what may.
    """
    if not is_name(name):
        raise RequestError(
            f"{name!r} cannot name a {kind}: use 1 to 80 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or a digit"
        )
    return name
