"""The contract of a `Store`: whatever it is, these hold."""

from __future__ import annotations

import contextlib
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from storage_faults import dying_disk, failing_disk, in_child, num_steps

from shoal.errors import CorruptError, NotFoundError, RequestError, StorageError, SupersededError
from shoal.storage import DiskStore, Fence, Store, Succession, open_store, s3
from shoal.storage.s3 import S3Store


def test_what_was_written_is_read(store: Store) -> None:
    assert store.list() == []
    store.put("a/b", b"one")
    assert store.create("c", b"")
    assert (store.read("a/b"), store.read("c")) == (b"one", b"")
    store.put("a/b", b"two")
    assert store.read("a/b") == b"two"
    again = pickle.loads(pickle.dumps(store))
    assert again == store
    assert again.read("a/b") == b"two"


def test_what_is_not_there_is_said_to_be_missing(store: Store, tmp_path: Path) -> None:
    for key in ("a", "a/b"):
        with pytest.raises(NotFoundError, match="does not exist"):
            store.read(key)
        with pytest.raises(NotFoundError, match="does not exist"):
            store.read_file(key, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    store.delete("a")
    assert store.list("a") == []


def test_what_is_created_is_never_replaced(store: Store) -> None:
    assert store.create("a", b"one")
    assert not store.create("a", b"two")
    assert store.read("a") == b"one"
    assert store.create("a", b"one"), "the answer to the first may have been lost"
    store.delete("a")
    assert store.create("a", b"two")


def test_of_many_that_create_at_once_one_does(store: Store) -> None:
    barrier = threading.Barrier(6)
    made: list[bytes] = []

    def create(content: bytes) -> None:
        barrier.wait(30)
        if store.create("token", content):
            made.append(content)

    threads = [threading.Thread(target=create, args=(bytes([number]),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made == [store.read("token")]


def test_keys_are_listed_by_prefix_in_order(store: Store, make_store: Callable[[str], Store]) -> None:
    keys = ["b/2", "b/1", "b", "ba", "a/b/c", "b.d/1"]
    for key in keys:
        if key != "b":  # a folder and a file of one name cannot be
            store.put(key, key.encode())
    make_store("store-of-another").put("b/9", b"")
    assert store.list() == ["a/b/c", "b.d/1", "b/1", "b/2", "ba"]
    assert store.list("b") == ["b.d/1", "b/1", "b/2", "ba"]
    assert store.list("b/") == ["b/1", "b/2"]
    assert store.list("b/1") == ["b/1"]
    assert store.list("c/") == []


def test_files_go_in_and_out(store: Store, tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # 10 MB: in parts, where a store sends so
    (tmp_path / "in").write_bytes(content)
    store.put_file("big/file", tmp_path / "in")
    store.read_file("big/file", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content
    assert store.read("big/file") == content
    store.put_file("big/file", tmp_path / "in")


def test_a_fence_holds(make_store: Callable[[str], Store]) -> None:
    fence = Fence(make_store("fence"))
    old = fence.take()
    old.begin({0: 10})
    new = pickle.loads(pickle.dumps(fence.take()))
    with pytest.raises(SupersededError, match=r"token 2; this one has 1"):
        old.check()
    with pytest.raises(SupersededError):
        fence.take(driver=old.number)
    assert fence.succession() == Succession(1, {0: 10}), "until the new one has begun"
    new.begin({0: 10, 1: 20})
    new.check()
    assert fence.succession() == Succession(2, {0: 10, 1: 20})
    assert fence.store.list() == ["000002.json"]


def test_many_keys_are_listed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one page of what a server lists at once."""
    if isinstance(store, S3Store):
        monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    for number in range(25):
        store.put(f"{number:03d}", b"")
    assert store.list() == [f"{number:03d}" for number in range(25)]


# --- what only a disk can do ----------------------------------------------------------------------------------


def put(store: Store, file: Path) -> None:
    store.put("a/b", b"new")


def create(store: Store, file: Path) -> None:
    store.create("a/c", b"new")


def put_file(store: Store, file: Path) -> None:
    store.put_file("a/b", file)


@pytest.mark.parametrize("verb", [put, create, put_file])
def test_on_a_disk_an_object_is_whole_or_not_there(
    tmp_path: Path, verb: Callable[[Store, Path], None]
) -> None:
    (file := tmp_path / "file").write_bytes(b"new")
    counted = DiskStore(tmp_path / "counted")
    counted.put("a/b", b"old")
    for step in range(num_steps(lambda disk: verb(DiskStore(counted.root, disk), file))):
        for kind in (failing_disk, dying_disk):
            store = DiskStore(tmp_path / f"{kind.__name__}-{step}")
            store.put("a/b", b"old")
            broken = DiskStore(store.root, kind(step))
            if kind is dying_disk:
                assert in_child(lambda broken=broken: verb(broken, file)) < 0
            else:
                with contextlib.suppress(StorageError):  # a temporary file that stays is only logged
                    verb(broken, file)
            assert {key: store.read(key) for key in store.list()} in (
                {"a/b": b"old"},
                {"a/b": b"new"},
                {"a/b": b"old", "a/c": b"new"},
            )
            verb(store, file)


def test_on_a_disk_nothing_but_plain_files_is_read(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptError, match="a link"):
        store.read("link")


# --- what only S3 can do --------------------------------------------------------------------------------------


def test_a_bucket_is_named_by_its_url(tmp_path: Path) -> None:
    assert open_store("s3://models") == S3Store("models")
    assert open_store("s3://models/team/a/") == S3Store("models", "team/a/")
    assert open_store(tmp_path) == open_store(str(tmp_path)) == DiskStore(tmp_path)
    for wrong in ("s3://", "s3:///a"):
        with pytest.raises(RequestError, match="s3://bucket/prefix"):
            open_store(wrong)
    with pytest.raises(RequestError, match="gs://models: storage is a folder, or s3://bucket/prefix"):
        open_store("gs://models")


def test_without_boto3_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(StorageError, match=r'pip install "shoal\[s3\]"'):
        open_store("s3://models")


def test_what_a_bucket_answers_is_said(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        StorageError, match=r"cannot write s3://nobody-made-this/a: .*NoSuchBucket.*check the bucket"
    ):
        S3Store("nobody-made-this", endpoint_url=s3_url).put("a", b"")
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 1)
    gone = S3Store("bucket", endpoint_url="http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot list s3://bucket/: Could not connect"):
        gone.list()


def test_an_answer_that_was_lost_costs_no_token(s3_store: Callable[[str], Store]) -> None:
    """The request arrived, its answer did not; boto3 sends it again, and the server says that it is taken."""
    store = s3_store("store")

    class Repeating(S3Store):
        def _put(self, key: str, content: bytes, **condition: str) -> None:
            super()._put(key, content, **condition)
            super()._put(key, content, **condition)

    assert isinstance(store, S3Store)
    assert Repeating(store.bucket, store.prefix, store.endpoint_url).create("a", b"mine")
    assert not Repeating(store.bucket, store.prefix, store.endpoint_url).create("a", b"another")
