"""Small JSON files that are replaced or created in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import CorruptError, NotFoundError
from shoal.storage.disk import (
    LOCAL_DISK,
    Disk,
    make_directories,
    read_plain,
    remove_quietly,
    storage_error,
)
from shoal.storage.owner import temporary_path

MAX_JSON_BYTES = 64 * 2**20


def write_json(path: Path, value: Any, *, disk: Disk = LOCAL_DISK) -> None:
    """Replace ``path`` by ``value`` in one step: a reader, also after a power cut, sees the old or the new.

    Raises:
        StorageError: the disk is full, read-only or gone; the old content is still there.
    """
    _write_then(disk.replace_file, path, value, disk)


def create_json(path: Path, value: Any, *, disk: Disk = LOCAL_DISK) -> bool:
    """Create ``path`` with ``value``; False, changing nothing, when it exists.

    Of any number of processes that try at once exactly one gets True, and whoever sees the file sees all
    of it: so this also serves as an election.

    Raises:
        StorageError: the disk is full, read-only or gone, or has no hard links.
    """
    if os.path.lexists(path):
        return False
    try:
        _write_then(disk.publish_file, path, value, disk)
    except FileExistsError:
        return False
    return True


def read_json(path: Path) -> Any:
    """The value in ``path``.

    Raises:
        NotFoundError: there is no such file.
        CorruptError: it is not JSON, no plain file, or absurdly large.
        StorageError: it cannot be read.
    """
    try:
        content = read_plain(path, max_bytes=MAX_JSON_BYTES)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise storage_error("read", path, error) from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON ({error}). Restore it or move it away.") from error


def _write_then(publish: Callable[[Path, Path], None], path: Path, value: Any, disk: Disk) -> None:
    content = json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
    temporary = temporary_path(path)
    try:
        make_directories(path.parent, disk)
        try:
            disk.write_file(temporary, content)
            publish(temporary, path)
        finally:
            remove_quietly(temporary, disk)
        disk.sync_directory(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error("write", path, error) from error
