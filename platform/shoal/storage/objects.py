"""A committed directory as objects of a `Store`: the commit protocol where nothing can be renamed.

Data first, under names that are their hashes, so that no writer replaces another's; the manifest last, by a
conditional write. Until that is there, nothing is; of two writers of one name the first wins.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shoal.errors import CorruptError, NotFoundError, StorageError
from shoal.storage.commit import MANIFEST, Manifest, commit_copy, parse_manifest, verify
from shoal.storage.store import Store


def push(directory: Path, store: Store, name: str, *, guard: Callable[[], None] = lambda: None) -> Manifest:
    """Commit a copy of the committed ``directory`` as ``name`` on ``store``: all of it, or nothing that readers see.

    Blocks until everything is durable there. Repeating it is safe, and sends only what is not there yet. ``guard``
    is asked as by `commit`, before and after the manifest is written.

    Raises:
        CorruptError: ``directory`` is damaged.
        SupersededError: ``guard`` raised it.
        StorageError: ``name`` holds something else; or either storage failed.
    """
    manifest = verify(directory)
    there = set(store.list(f"{name}/{_DATA}/"))
    for path, entry in manifest.files.items():
        if (key := _data_key(name, entry.sha256)) not in there:
            store.put_file(key, directory / path)
    guard()
    if not store.create(f"{name}/{MANIFEST}", (directory / MANIFEST).read_bytes()):
        raise StorageError(
            f"cannot commit {name} on {store}: it holds something else already, and what is committed never changes. "
            "Use another name"
        )
    guard()
    return manifest


def pull(store: Store, name: str, directory: Path) -> Manifest:
    """Commit a copy of what `push` committed as ``name`` as ``directory``; every byte is compared with the manifest.

    Raises:
        NotFoundError: nothing of that name is committed.
        CorruptError: something of it is damaged or missing; nothing is left at ``directory``.
        StorageError: ``directory`` exists; or either storage failed.
    """
    where = Path(f"{store}/{name}")
    manifest = parse_manifest(store.read(f"{name}/{MANIFEST}"), where)

    def fetch(path: str, target: Path) -> None:
        try:
            store.read_file(_data_key(name, manifest.files[path].sha256), target)
        except NotFoundError as error:
            raise CorruptError(
                f"{where} is damaged: the data of {path} are missing. It is not used."
            ) from error

    return commit_copy(manifest, fetch, directory)


def pushed(store: Store, prefix: str = "") -> list[str]:
    """The names under ``prefix`` that are committed, sorted; not verified here."""
    end = f"/{MANIFEST}"
    return [key.removesuffix(end) for key in store.list(prefix) if key.endswith(end)]


_DATA = "data"


def _data_key(name: str, sha256: str) -> str:
    return f"{name}/{_DATA}/{sha256}"
