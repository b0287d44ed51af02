"""A committed directory that is being read is not deleted: its reader holds a lock, which dies with it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shoal.errors import CorruptError
from shoal.storage.commit import MANIFEST, discard
from shoal.storage.disk import LOCAL_DISK, Disk, open_plain, storage_error

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[None]:
    """While this is open, `discard_unread` leaves the committed ``directory`` alone. Does not block.

    Where the file system knows no locks nothing is protected, and a reader may find that files are gone.

    Raises:
        CorruptError: it is gone or about to be, or no committed directory.
        StorageError: it cannot be opened now.
    """
    file = _open_locked(directory)
    with file:
        yield


def _open_locked(directory: Path) -> BinaryIO:
    path = directory / MANIFEST
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_plain(path))
            # Who deletes renames first: what we have locked may have lost its name before we had it.
            is_there = _lock(file, fcntl.LOCK_SH) and os.path.samestat(
                os.fstat(file.fileno()), os.lstat(path)
            )
        except FileNotFoundError:
            is_there = False
        except OSError as error:
            raise storage_error("read", directory, error) from error
        if not is_there:
            raise CorruptError(f"{directory} was deleted, or never committed. It is not used.")
        stack.pop_all()
        return file


def discard_unread(directory: Path, *, disk: Disk = LOCAL_DISK) -> bool:
    """`discard`, unless somebody is `reading` it; says whether it is gone.

    Raises:
        StorageError: it could not be deleted.
    """
    try:
        with open_plain(directory / MANIFEST) as file:
            if not _lock(file, fcntl.LOCK_EX):
                return False
            discard(directory, disk=disk)
    except (FileNotFoundError, CorruptError):  # nobody reads what has no manifest
        discard(directory, disk=disk)
    except OSError as error:
        raise storage_error("delete", directory, error) from error
    return True


def _lock(file: BinaryIO, kind: int) -> bool:
    """Whether nobody is in the way; on a file system without locks never is anybody."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        logger.debug("%s cannot be locked", file.name, exc_info=True)
    return True
