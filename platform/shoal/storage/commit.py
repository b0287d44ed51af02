"""The commit protocol: a directory that is there whole and verified, or not at all.

Write beside the target, sync, add a manifest, sync, rename, sync the parent. Until the rename nothing has
the final name; a reader uses only what `verify` has compared with the manifest, byte for byte.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.errors import CorruptError, StorageError
from shoal.storage.disk import (
    DIRECTORY_MODE,
    LOCAL_DISK,
    Disk,
    make_directories,
    read_plain,
    remove_quietly,
    storage_error,
)
from shoal.storage.owner import is_abandoned, temporary_path

MANIFEST = "MANIFEST.json"
MAX_MANIFEST_BYTES = 16 * 2**20
FORMAT = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """What one file of a committed directory must look like."""

    size_bytes: int
    sha256: str
    """Of the whole content, in lower-case hex."""


@dataclass(frozen=True)
class Manifest:
    """What a committed directory holds."""

    files: Mapping[str, FileEntry]
    """By path relative to the directory, with ``/``; sorted. The manifest itself is not among them."""
    meta: Mapping[str, Any]
    """What the writer gave as ``meta``, as JSON gives it back (tuples are lists)."""

    @property
    def size_bytes(self) -> int:
        """Bytes in all files together, without the manifest."""
        return sum(entry.size_bytes for entry in self.files.values())

    @property
    def digest(self) -> str:
        """Of everything the directory holds, in lower-case hex: equal contents, equal digests."""
        return _digest(_body(self.files, self.meta))


def commit(
    directory: Path,
    write: Callable[[Path], None],
    *,
    meta: Mapping[str, Any],
    guard: Callable[[], None] = lambda: None,
    measured: Mapping[str, FileEntry] | None = None,
    disk: Disk = LOCAL_DISK,
) -> Manifest:
    """Create ``directory`` with what ``write`` puts into the path that it is given; all of it or nothing.

    Blocks until everything is on disk. ``write`` may create files and sub-directories and must have closed
    them when it returns; what it has measured of them as it wrote them it may put into ``measured``, by relative
    path, and the others are read again. Empty sub-directories are not recorded. ``meta`` must be JSON. Missing
    parents are created. After a failure of any kind, and after an exception from ``write`` (passed on unchanged
    unless it is an ``OSError``), nothing is left; after the death of the process a temporary directory may be left
    that no reader sees and `collect_orphans` removes.

    ``guard`` raises when the caller has lost the right to write (`Token.check`). It is asked right before the rename,
    and again when all is durable: what a rename in between has published is left there, for readers to judge.

    Raises:
        SupersededError: ``guard`` raised it.
        StorageError: ``directory`` exists, whatever is in it; or the disk is full, read-only or gone.
    """
    if os.path.lexists(directory):
        raise _exists(directory)
    temporary = temporary_path(directory)
    try:
        make_directories(directory.parent, disk)
        disk.make_directory(temporary)
        write(temporary)
        manifest = _seal(temporary, meta, disk, measured or {})
        guard()
        disk.publish_directory(temporary, directory)
    except BaseException as error:
        remove_quietly(temporary, disk)
        if not isinstance(error, OSError):
            raise
        if os.path.lexists(directory) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _exists(directory) from None
        raise storage_error("commit", directory, error) from error
    try:
        disk.sync_directory(directory.parent)
    except OSError as error:
        raise storage_error("make sure that a power cut would not lose", directory, error) from error
    guard()
    return manifest


def copy_committed(source: Path, directory: Path, *, disk: Disk = LOCAL_DISK) -> Manifest:
    """Commit a copy of the committed directory ``source`` as ``directory``; blocks as `commit` does.

    Every byte that was copied is compared with the manifest of ``source`` before the copy gets its name.

    Raises:
        CorruptError: ``source`` is damaged, or was discarded meanwhile; nothing is left at ``directory``.
        StorageError: as `commit`.
    """
    try:
        manifest = parse_manifest(_read_manifest(source), source)
    except OSError as error:
        raise _unreadable(source, error) from error

    def fetch(path: str, target: Path) -> None:
        try:
            shutil.copyfile(source / path, target, follow_symlinks=False)
        except FileNotFoundError as error:
            raise CorruptError(f"{source} was discarded while it was copied") from error

    return commit_copy(manifest, fetch, directory, disk=disk)


def commit_copy(
    manifest: Manifest, fetch: Callable[[str, Path], None], directory: Path, *, disk: Disk = LOCAL_DISK
) -> Manifest:
    """Commit as ``directory`` the files of ``manifest``, which ``fetch(path, target)`` brings.

    Every byte is compared with the manifest before the copy gets its name.

    Raises:
        CorruptError: it is not what the manifest says; nothing is left at ``directory``.
        StorageError: as `commit`.
    """

    def write(folder: Path) -> None:
        for path in manifest.files:
            make_directories((folder / path).parent)
            fetch(path, folder / path)
        _compare(folder, manifest)

    return commit(directory, write, meta=manifest.meta, disk=disk)


def verify(directory: Path) -> Manifest:
    """The manifest of a committed directory, after comparing every byte of every file with it.

    Guards against accidents (torn writes, bad disks, files edited or exchanged by hand), not against a
    forger, who can write a matching manifest. Nothing outside ``directory`` is read, whatever the manifest
    says: symbolic links and special files are refused.

    Raises:
        CorruptError: anything is missing, added, changed or cut short; there is no such directory; or the
            disk reports unreadable blocks.
        StorageError: the files cannot be read now, which says nothing about their content.
    """
    try:
        if not stat.S_ISDIR(os.lstat(directory).st_mode):
            raise CorruptError(f"{directory} is not a directory. Nothing of it is used.")
        manifest = parse_manifest(_read_manifest(directory), directory)
        _compare(directory, manifest)
    except OSError as error:
        raise _unreadable(directory, error) from error
    return manifest


def newest_verified(
    parent: Path,
    *,
    on_rejected: Callable[[Path, str], None],
    named: Callable[[str], bool] = lambda _: True,
    check: Callable[[Path, Manifest], None] = lambda *_: None,
) -> tuple[Path, Manifest] | None:
    """The last directory in ``parent``, by name, that verifies; None when there is none.

    ``named`` says of a directory's name whether it may be one; others are not looked at, nor are temporary
    directories and plain files. ``check`` may raise CorruptError about one that verifies but is not what the
    caller looks for. Every one tried and refused before the one that is returned is passed to ``on_rejected``
    with the reason, newest first, and left in place.

    Raises:
        StorageError: the files cannot be read now. We do not fall back then: older state would be used, and
            work lost, for what may be a passing failure.
    """
    try:
        names = sorted((entry.name for entry in os.scandir(parent) if entry.is_dir()), reverse=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("list", parent, error) from error
    for name in names:
        if name.startswith(".") or not named(name):
            continue
        try:
            manifest = verify(parent / name)
            check(parent / name, manifest)
            return parent / name, manifest
        except CorruptError as error:
            if os.path.lexists(parent / name):  # else it was discarded meanwhile, which is no damage
                on_rejected(parent / name, str(error))
    return None


def discard(directory: Path, *, disk: Disk = LOCAL_DISK) -> None:
    """Delete a committed directory so that no reader ever sees half of it. One that is gone is fine.

    Raises:
        StorageError: it could not be deleted; it may have lost its name already.
    """
    doomed = temporary_path(directory)
    try:
        disk.publish_directory(directory, doomed)
        disk.sync_directory(directory.parent)
        disk.remove(doomed)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error("delete", directory, error) from error


def collect_orphans(parent: Path, *, disk: Disk = LOCAL_DISK) -> list[Path]:
    """Delete what dead writers left unfinished in ``parent`` (not below it); returns what was deleted.

    Temporary files of living processes are never touched; those of other machines only after a day
    without a change. Safe to repeat and to run beside writers and other collectors. What cannot be
    deleted is logged and left.
    """
    try:
        candidates = [path for path in parent.iterdir() if is_abandoned(path)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error("list", parent, error) from error
    return [path for path in sorted(candidates) if remove_quietly(path, disk)]


def parse_manifest(content: bytes, directory: Path) -> Manifest:
    """The manifest in ``content``, every byte of which is covered by its digest.

    Raises:
        CorruptError: it is not exactly what `commit` wrote, or names a path outside ``directory``.
    """
    try:
        document = json.loads(content)
        body = {key: document[key] for key in ("format", "files", "meta")}
        # Comparing the rendered bytes covers what parsing forgives: white space, order, repeated keys.
        is_intact = _render(body) == content
    except (ValueError, KeyError, TypeError, RecursionError):
        is_intact = False
    if not is_intact:
        raise _damaged(directory, f"{MANIFEST} is not as it was written")
    if body["format"] != FORMAT:
        raise _damaged(directory, f"{MANIFEST} has format {body['format']!r}; this shoal reads {FORMAT}")
    files, meta = body["files"], body["meta"]
    if not isinstance(files, dict) or not isinstance(meta, dict):
        raise _damaged(directory, f"{MANIFEST} does not list files and meta")
    return Manifest({path: _parse_entry(directory, path, entry) for path, entry in files.items()}, meta)


def _parse_entry(directory: Path, path: str, entry: Any) -> FileEntry:
    if not _is_safe(path):
        raise _damaged(directory, f"{MANIFEST} names {path!r}, which is not a plain path inside it")
    match entry:
        case {"size_bytes": int(size_bytes), "sha256": str(sha256)} if (
            len(entry) == 2 and size_bytes >= 0 and _SHA256.fullmatch(sha256)
        ):
            return FileEntry(size_bytes, sha256)
    raise _damaged(directory, f"{MANIFEST} has a malformed entry for {path!r}")


def _is_safe(path: str) -> bool:
    parts = path.split("/")
    return path != MANIFEST and not any(part in ("", ".", "..") or "\0" in part for part in parts)


def _render(body: Mapping[str, Any]) -> bytes:
    """The one byte sequence for a manifest; its last field is the digest of the rest."""
    return json.dumps({**body, "digest": _digest(body)}, indent=1, sort_keys=True).encode() + b"\n"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _body(files: Mapping[str, FileEntry], meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest's digest covers."""
    return {
        "format": FORMAT,
        "files": {path: asdict(entry) for path, entry in files.items()},
        "meta": dict(meta),
    }


def _seal(
    temporary: Path, meta: Mapping[str, Any], disk: Disk, measured: Mapping[str, FileEntry]
) -> Manifest:
    """Make everything in ``temporary`` durable and add its manifest."""
    files = {}
    paths, folders = _scan(temporary)
    if MANIFEST in paths:
        raise StorageError(f"cannot commit {temporary}: {MANIFEST} is the name of the manifest; use another")
    for path in paths:
        # Hashed before the sync, while the pages are surely in memory.
        entry = measured.get(path) or _measure(temporary / path)
        disk.sync_file(temporary / path)
        files[path] = entry
    content = _render(_body(files, meta))
    if len(content) > MAX_MANIFEST_BYTES:
        raise StorageError(f"cannot commit {temporary}: its manifest would have {len(content)} bytes")
    disk.write_file(temporary / MANIFEST, content)
    for folder in [*folders, "."]:
        os.chmod(temporary / folder, DIRECTORY_MODE)
        disk.sync_directory(temporary / folder)
    return parse_manifest(content, temporary)


def _read_manifest(directory: Path) -> bytes:
    try:
        return read_plain(directory / MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        if not directory.exists():
            raise
        raise _damaged(directory, f"it has no {MANIFEST}, so it was never committed") from None


def _compare(directory: Path, manifest: Manifest) -> None:
    """Only files found by listing are opened, never a path that the manifest gives."""
    found = set(_scan(directory)[0]) - {MANIFEST}
    if missing := sorted(manifest.files.keys() - found):
        raise _damaged(directory, f"missing: {', '.join(missing[:5])}")
    if added := sorted(found - manifest.files.keys()):
        raise _damaged(directory, f"not in the manifest: {', '.join(added[:5])}")
    for path, entry in manifest.files.items():
        size_bytes = os.lstat(directory / path).st_size
        if size_bytes != entry.size_bytes:
            raise _damaged(directory, f"{path} has {size_bytes} bytes instead of {entry.size_bytes}")
    for path, entry in manifest.files.items():
        if _measure(directory / path) != entry:
            raise _damaged(directory, f"the content of {path} is not what was written")


def _scan(directory: Path) -> tuple[list[str], list[str]]:
    """Relative paths of all files, sorted, and of all folders, deepest first."""
    files: list[str] = []
    folders: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(directory / prefix) as entries:
            for entry in entries:
                path = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                    pending.append(path + "/")
                elif entry.is_file(follow_symlinks=False):
                    files.append(path)
                else:
                    raise _damaged(directory, f"{path} is a link or a special file, which we never follow")
    return sorted(files), sorted(folders, key=lambda path: (-path.count("/"), path))


def _measure(path: Path) -> FileEntry:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(file.tell(), digest.hexdigest())


def _unreadable(directory: Path, error: OSError) -> CorruptError | StorageError:
    """Damage where the files are to blame; a passing failure says nothing about their content."""
    if error.errno in (errno.ENOENT, errno.EIO, errno.ELOOP, errno.ENOTDIR):
        return CorruptError(
            f"{directory} is damaged: {error.filename or directory}: {error.strerror}. It is not used."
        )
    return storage_error("read", directory, error)


def _damaged(directory: Path, reason: str) -> CorruptError:
    return CorruptError(f"{directory} is damaged: {reason}. It is not used.")


def _exists(directory: Path) -> StorageError:
    return StorageError(
        f"cannot commit {directory}: it exists already, and what is committed never changes. "
        "Use another name, or discard it first."
    )
