"""Committed directories as objects: whole or not there, on every kind of `Store`, whenever the writer dies."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from storage_faults import commit_content

from shoal.errors import CorruptError, NotFoundError, StorageError, SupersededError
from shoal.storage import MANIFEST, Fence, Store, commit, pull, push, pushed, verify

pytestmark = pytest.mark.usefixtures("make_store")


class Dying:
    """A store of which call ``at`` is the last thing that its caller does; with a lost answer, after it was done."""

    def __init__(self, store: Store, at: int, *, is_done: bool) -> None:
        self._store, self._at, self._is_done = store, at, is_done
        self.num_calls = 0

    def __getattr__(self, verb: str) -> Any:
        call = getattr(self._store, verb)

        def run(*args: Any) -> Any:
            self.num_calls += 1
            if self.num_calls - 1 == self._at:
                if self._is_done:
                    call(*args)
                raise ConnectionResetError
            return call(*args)

        return run


def test_what_was_pushed_is_pulled(store: Store, committed: Path, tmp_path: Path) -> None:
    manifest = push(committed, store, "run/step-7")
    assert push(committed, store, "run/step-7") == manifest, "again: fine"
    assert pushed(store) == pushed(store, "run/") == ["run/step-7"]
    assert pull(store, "run/step-7", tmp_path / "copy") == manifest == verify(tmp_path / "copy")
    with pytest.raises(NotFoundError):
        pull(store, "run/step-8", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_of_two_writers_of_one_name_the_first_wins(store: Store, committed: Path, tmp_path: Path) -> None:
    commit(other := tmp_path / "other", lambda folder: None, meta={"other": True})
    manifest = push(committed, store, "run/step-7")
    with pytest.raises(StorageError, match="something else already"):
        push(other, store, "run/step-7")
    assert pull(store, "run/step-7", tmp_path / "copy") == manifest


@pytest.mark.parametrize("is_done", [False, True])
def test_whenever_the_writer_dies_it_is_whole_or_not_there(
    make_store: Callable[[str], Store], committed: Path, tmp_path: Path, is_done: bool
) -> None:
    counted = Dying(make_store("counted"), -1, is_done=False)
    manifest = push(committed, counted, "x")  # type: ignore[arg-type]
    for at in range(counted.num_calls):
        store = make_store(f"{at}-{is_done}")
        with pytest.raises(ConnectionResetError):
            push(committed, Dying(store, at, is_done=is_done), "x")  # type: ignore[arg-type]
        is_committed = is_done and at == counted.num_calls - 1
        assert pushed(store) == (["x"] if is_committed else [])
        assert push(committed, store, "x") == manifest, "whoever goes on is not in its own way"
        assert pull(store, "x", tmp_path / f"{at}") == manifest


@pytest.mark.parametrize("damage", ["flip", "lose", "manifest"])
def test_damage_is_found(store: Store, committed: Path, tmp_path: Path, damage: str) -> None:
    push(committed, store, "x")
    largest = max(store.list("x/data/"), key=lambda key: len(store.read(key)))
    match damage:
        case "flip":
            store.put(largest, store.read(largest)[:-1] + b"!")
        case "lose":
            store.delete(largest)
        case "manifest":
            store.put(f"x/{MANIFEST}", store.read(f"x/{MANIFEST}").replace(b"7", b"8"))
    with pytest.raises(CorruptError, match="is damaged"):
        pull(store, "x", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_who_was_superseded_commits_nothing_that_is_read(
    make_store: Callable[[str], Store], committed: Path, tmp_path: Path
) -> None:
    """Before the manifest it writes none; between the two looks it says so."""
    store, fence = make_store("objects"), Fence(make_store("fence"))
    old = fence.take()
    old.begin({})

    class Late:
        def __getattr__(self, verb: str) -> Any:
            if verb == "create":
                fence.take()
            return getattr(store, verb)

    with pytest.raises(SupersededError):
        push(committed, Late(), "late", guard=old.check)  # type: ignore[arg-type]
    with pytest.raises(SupersededError):
        push(committed, store, "never", guard=old.check)
    assert pushed(store) == ["late"]
    fence.take().begin({})
    assert not fence.succession().counts(7, old.number)


def test_two_at_once_do_not_mix(store: Store, tmp_path: Path) -> None:
    sources = [tmp_path / "one", tmp_path / "two"]
    for source in sources:
        commit_content(source)
    shutil.rmtree(sources[1])
    commit(sources[1], lambda folder: (folder / "weights.bin").write_bytes(b"two") and None, meta={})
    won: list[Path] = []

    def work(source: Path) -> None:
        try:
            push(source, store, "x")
            won.append(source)
        except StorageError:
            pass

    threads = [threading.Thread(target=work, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (winner,) = won
    assert pull(store, "x", tmp_path / "copy") == verify(winner)
