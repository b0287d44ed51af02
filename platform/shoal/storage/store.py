"""What the protocols need of a storage, be it a disk or a bucket: a few verbs on whole objects.

One contract test holds for every backend (`tests/storage/test_store.py`). Keys are relative paths with ``/``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shoal.errors import NotFoundError, RequestError
from shoal.storage.disk import LOCAL_DISK, Disk, make_directories, read_plain, remove_quietly, storage_error
from shoal.storage.owner import temporary_path

MAX_OBJECT_BYTES = 64 * 2**20
"""Of what is read into memory; larger ones are files."""


class Store(Protocol):
    """Objects by key. May be pickled and shared by threads; making one touches nothing.

    An object is there whole or not at all, and is durable once its verb has returned. Who lists or reads after a
    verb has returned sees what it did. Every verb raises StorageError where the storage fails.
    """

    def create(self, key: str, content: bytes) -> bool:
        """Make the object, if there is none of that key; whether the object that is there has this ``content``.

        Of any number of callers with different contents exactly one gets True. Repeating a call that got True is
        safe: a request whose answer was lost may be sent again.
        """
        ...

    def put(self, key: str, content: bytes) -> None:
        """Make or replace the object, in one step."""
        ...

    def put_file(self, key: str, file: Path) -> None:
        """As `put`, from a file of any size."""
        ...

    def read(self, key: str) -> bytes:
        """The object, of at most `MAX_OBJECT_BYTES`.

        Raises:
            NotFoundError: there is none.
        """
        ...

    def read_file(self, key: str, file: Path) -> None:
        """Write the object, of any size, to ``file``, which must not exist.

        Raises:
            NotFoundError: there is none; nothing is at ``file``.
        """
        ...

    def list(self, prefix: str = "") -> list[str]:
        """The keys that begin with ``prefix``, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Delete the object; one that is gone is fine."""
        ...


@dataclass(frozen=True)
class DiskStore:
    """A folder as a `Store`; it is created when first written to."""

    root: Path
    disk: Disk = field(default=LOCAL_DISK, compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.root)

    def create(self, key: str, content: bytes) -> bool:
        path = self.root / key
        if not os.path.lexists(path):
            with contextlib.suppress(FileExistsError):  # another was faster
                self._place(path, lambda file: self.disk.write_file(file, content), self.disk.publish_file)
                return True
        try:
            return self.read(key) == content
        except NotFoundError:  # and is gone again
            return False

    def put(self, key: str, content: bytes) -> None:
        path = self.root / key
        self._place(path, lambda file: self.disk.write_file(file, content), self.disk.replace_file)

    def put_file(self, key: str, file: Path) -> None:
        def write(temporary: Path) -> None:
            shutil.copyfile(file, temporary, follow_symlinks=False)
            self.disk.sync_file(temporary)

        self._place(self.root / key, write, self.disk.replace_file)

    def _place(
        self, path: Path, write: Callable[[Path], None], publish: Callable[[Path, Path], None]
    ) -> None:
        """Write beside ``path``, durably, and give it that name in one step; FileExistsError passes."""
        temporary = temporary_path(path)
        try:
            make_directories(path.parent, self.disk)
            try:
                write(temporary)
                publish(temporary, path)
            finally:
                remove_quietly(temporary, self.disk)
            self.disk.sync_directory(path.parent)
        except FileExistsError:
            raise
        except OSError as error:
            raise storage_error("write", path, error) from error

    def read(self, key: str) -> bytes:
        path = self.root / key
        try:
            return read_plain(path, max_bytes=MAX_OBJECT_BYTES)
        except FileNotFoundError:
            raise no_object(path) from None
        except OSError as error:
            raise storage_error("read", path, error) from error

    def read_file(self, key: str, file: Path) -> None:
        path = self.root / key
        if not os.path.lexists(path):
            raise no_object(path)
        try:
            shutil.copyfile(path, file, follow_symlinks=False)
        except FileNotFoundError:
            raise no_object(path) from None
        except OSError as error:
            raise storage_error("read", path, error) from error

    def list(self, prefix: str = "") -> list[str]:
        found = []
        try:
            for folder, _, names in os.walk(self.root / prefix.rpartition("/")[0], onerror=_raise):
                keys = (os.path.relpath(os.path.join(folder, name), self.root) for name in names)
                found += [key for key in keys if key.startswith(prefix) and not _is_temporary(key)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error("list", self.root / prefix, error) from error
        return sorted(found)

    def delete(self, key: str) -> None:
        path = self.root / key
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("delete", path, error) from error


def _raise(error: OSError) -> None:
    raise error


def _is_temporary(key: str) -> bool:
    """Whether it is no object but the unfinished form of one; see `shoal.storage.owner`."""
    name = key.rpartition("/")[2]
    return name.startswith(".") and name.endswith(".tmp")


def no_object(where: object) -> NotFoundError:
    """The error for an object that is not there."""
    return NotFoundError(f"{where} does not exist")


def open_store(place: str | Path) -> Store:
    """The store at ``s3://bucket/prefix``, or in a folder.

    Raises:
        RequestError: neither.
        StorageError: what S3 needs is not installed.
    """
    if isinstance(place, str) and place.startswith("s3://"):
        from shoal.storage.s3 import S3Store

        return S3Store.at(place)
    if isinstance(place, str) and "://" in place:
        raise RequestError(f"{place}: storage is a folder, or s3://bucket/prefix")
    return DiskStore(Path(place))
