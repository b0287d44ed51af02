"""The few file-system calls that durability rests on, in one place.

`Disk` is the seam: tests replace it to fail or to die between any two calls, and another kind of storage
implements the same calls.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from shoal.errors import CorruptError, StorageError

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700


class Disk:
    """A local (or locally mounted) file system. Every method raises plain ``OSError``."""

    def make_directory(self, path: Path) -> None:
        """Create ``path``, private to its owner; it must not exist."""
        os.mkdir(path, DIRECTORY_MODE)

    def write_file(self, path: Path, content: bytes) -> None:
        """Create ``path`` with ``content``, on disk when this returns; it must not exist."""
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def sync_file(self, path: Path) -> None:
        """Make the file private to its owner and its content durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fchmod(descriptor, FILE_MODE)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Make the names in ``path`` durable: files created in it, renamed into it or out of it."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def publish_directory(self, source: Path, target: Path) -> None:
        """Rename a non-empty directory to ``target``, which must not exist.

        POSIX lets rename replace an *empty* directory only, so of two writers that publish under one name
        the second fails with ENOTEMPTY; unlike renameat2(RENAME_NOREPLACE) this also holds on NFS.
        """
        os.rename(source, target)

    def publish_file(self, source: Path, target: Path) -> None:
        """Give the file the name ``target`` too; ``FileExistsError`` when that is taken."""
        os.link(source, target, follow_symlinks=False)

    def replace_file(self, source: Path, target: Path) -> None:
        """Rename the file to ``target``, replacing what was there in one step."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Delete a file or a whole directory; one that is gone already is fine."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


LOCAL_DISK = Disk()
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_log = logging.getLogger(__name__)


def make_directories(path: Path, disk: Disk = LOCAL_DISK) -> None:
    """Create ``path`` and its missing parents, each private to its owner and durable."""
    if path.is_dir():
        return
    make_directories(path.parent, disk)
    try:
        disk.make_directory(path)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        return  # another process was first
    disk.sync_directory(path.parent)


def open_plain(path: Path) -> BinaryIO:
    """Open a file of ours for reading that may have been exchanged for anything. Never blocks on what it is.

    Raises:
        CorruptError: it is a link, a folder, a pipe, a socket or a device: none of these did we write.
        OSError: it cannot be opened, or is not there.
    """
    # A look before opening, since opening a device can do things; and one after, since it may have changed.
    _check_plain(path, os.lstat(path))
    file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    try:
        _check_plain(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def _check_plain(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CorruptError(
            f"{path} is no plain file but {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, so it is not "
            "what was written there. Restore it or move it away."
        )


def read_plain(path: Path, *, max_bytes: int) -> bytes:
    """The whole content of a file of ours, as `open_plain` opens it.

    Raises:
        CorruptError: as `open_plain`; or it has more than ``max_bytes``.
        OSError: it cannot be read, or is not there.
    """
    with open_plain(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise CorruptError(f"{path} has more than {max_bytes} bytes. Restore it or move it away.")
    return content


def remove_quietly(path: Path, disk: Disk = LOCAL_DISK) -> bool:
    """Best effort; says whether ``path`` is gone, and logs what it left behind."""
    try:
        disk.remove(path)
    except FileNotFoundError:  # somebody else removes it too
        return not path.exists()
    except OSError:
        _log.warning("could not delete %s; it is unfinished and not used", path, exc_info=True)
        return False
    return True


def storage_error(action: str, path: Path, error: OSError) -> StorageError:
    """The ``StorageError`` for a failed ``action`` on ``path``: what failed, free space, what to do next."""
    reason = error.strerror or str(error)
    where = f" at {error.filename}" if error.filename and str(error.filename) != str(path) else ""
    return StorageError(
        f"cannot {action} {path}: {reason}{where} ({_free_text(path)}). "
        f"What was committed before is untouched; {_next_step(error)}."
    )


def is_full(error: BaseException | None) -> bool:
    """Whether the disk, or this user's share of it, had no room left: that is what ``error`` says or comes from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of ``path`` (or of its nearest parent)."""
    return shutil.disk_usage(nearest_existing(path)).free


def nearest_existing(path: Path) -> Path:
    """``path``, or where it does not exist the first folder above it that does."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def size_text(size_bytes: float) -> str:
    """A number of bytes for people: ``3.2 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1024 or unit == "TiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:.1f}".removesuffix(".0") + f" {unit}"


def _free_text(path: Path) -> str:
    try:
        return f"{size_text(free_bytes(path))} free there"
    except OSError as error:
        return f"free space unknown: {error.strerror}"


def _next_step(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space there, or point `storage:` in cluster.yaml at a larger disk, and try again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it writable for this user, or point `storage:` in cluster.yaml elsewhere"
    return "check the disk, or point `storage:` in cluster.yaml elsewhere, and try again"
