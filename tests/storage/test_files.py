"""Small files, journals and the layout."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_faults import SteppedDisk, dying_disk, failing_disk, in_child, num_steps, start_child, wait_child

import shoal.storage.layout as layout
from shoal.errors import CorruptError, NotFoundError, RequestError, StorageError
from shoal.storage import (
    MAX_LINE_BYTES,
    Storage,
    append_line,
    collect_orphans,
    create_json,
    read_json,
    read_lines,
    write_json,
)


def test_json_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": [1, 2.5, None, "é"]})
    assert read_json(path) == {"a": [1, 2.5, None, "é"]}
    assert path.stat().st_mode & 0o777 == 0o600
    write_json(path, 2)
    assert read_json(path) == 2
    assert os.listdir(path.parent) == ["a.json"]


def test_dying_while_writing_json_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, "old")
    seen = set()
    for step in range(num_steps(lambda disk: write_json(path, "old", disk=disk))):
        assert in_child(lambda step=step: write_json(path, "new", disk=dying_disk(step))) == -signal.SIGKILL
        seen.add(read_json(path))
        collect_orphans(tmp_path)
        assert os.listdir(tmp_path) == ["a.json"]
        write_json(path, "old")
    assert seen == {"old", "new"}


def test_json_on_a_full_disk_keeps_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, "old")
    with pytest.raises(StorageError, match=r"a\.json.*No space left"):
        write_json(path, "new", disk=failing_disk(0))
    assert read_json(path) == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_creating_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert create_json(path, 1)
    assert not create_json(path, 2)
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_of_many_that_create_at_once_exactly_one_does(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def create(number: int) -> None:
        os.read(reader, 1)  # all start together
        os._exit(10 if create_json(tmp_path / "a.json", number) else 0)

    pids = [start_child(lambda number=number: create(number)) for number in range(8)]
    os.write(writer, b"x" * len(pids))
    codes = [wait_child(pid) for pid in pids]
    assert sorted(codes) == [0] * 7 + [10]
    assert read_json(tmp_path / "a.json") == codes.index(10)
    assert os.listdir(tmp_path) == ["a.json"]


def test_whoever_publishes_first_has_created(tmp_path: Path) -> None:
    """The other process creates the file after we looked whether it exists."""
    path = tmp_path / "a.json"

    def be_overtaken(step: int, name: str) -> None:
        if name == "publish_file":
            assert create_json(path, "other")

    assert not create_json(path, "mine", disk=SteppedDisk(be_overtaken))
    assert read_json(path) == "other"
    assert os.listdir(tmp_path) == ["a.json"]


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(NotFoundError, match=r"a\.json"):
        read_json(path)
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(CorruptError, match=r"a\.json"):
            read_json(path)


LINES = ['{"a": 1}', '{"b": "é"}']


def test_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    assert read_lines(path) == []
    for line in LINES:
        append_line(path, line, sync=True)
    assert read_lines(path) == LINES
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_torn_anywhere_loses_only_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = "".join(line + "\n" for line in LINES).encode()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        num_whole = whole[:length].count(b"\n")
        assert read_lines(path) == LINES[:num_whole]
        append_line(path, '{"after": 1}')
        assert read_lines(path) == [*LINES[:num_whole], '{"after": 1}']


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=5), st.integers(0, 3)), max_size=8))
def test_any_sequence_of_writes_and_cuts(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    kept: list[str] = []
    for text, num_cut in writes:
        line = json.dumps(text)
        append_line(path, line)
        os.truncate(path, path.stat().st_size - min(num_cut, len(line.encode()) + 1))
        kept += [] if num_cut else [line]
        assert read_lines(path) == kept


def test_a_line_that_the_disk_took_only_half_of_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    append_line(path, LINES[0])

    def append_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
        with pytest.raises(StorageError, match="only a part"):
            append_line(path, "x" * 100)

    assert in_child(append_too_much) == 0
    assert path.stat().st_size == 50
    assert read_lines(path) == LINES[:1]
    append_line(path, LINES[1])
    assert read_lines(path) == LINES


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"torn")

    def append(number: int) -> None:
        for count in range(50):
            append_line(path, f"{number} {count} " + "x" * 500 * number)

    for pid in [start_child(lambda number=number: append(number)) for number in range(4)]:
        assert wait_child(pid) == 0
    lines = [line.split(" ") for line in read_lines(path)]
    assert all(len(text) == 500 * int(number) for number, _, text in lines)
    for number in range(4):
        assert [int(count) for n, count, _ in lines if int(n) == number] == list(range(50))


@pytest.mark.parametrize("line", ["two\nlines", "control \x18", "x" * MAX_LINE_BYTES])
def test_a_line_that_could_not_be_read_back_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(RequestError, match=r"journal\.jsonl"):
        append_line(tmp_path / "journal.jsonl", line)
    assert os.listdir(tmp_path) == []


def test_bytes_that_are_no_text_do_not_hide_the_other_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"a\n\xff\n\n" + b"x" * MAX_LINE_BYTES + b"\nb\n")
    assert read_lines(path) == ["a", "\ufffd", "b"]


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "storage")
    assert storage.run_dir("digits-0a1b2c3d") == tmp_path / "storage/runs/digits-0a1b2c3d"
    assert storage.sweep_dir("s.1") == tmp_path / "storage/sweeps/s.1"
    assert storage.model_dir("digits", 3) == tmp_path / "storage/models/digits/3"
    assert storage.tracking_dir == tmp_path / "storage/tracking"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "-x", "a b", "a\n", "A", "a" * 81]
)
def test_a_name_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    storage = Storage(tmp_path)
    for directory in (storage.run_dir, storage.sweep_dir, lambda name: storage.model_dir(name, 1)):
        with pytest.raises(RequestError, match="cannot name a"):
            directory(name)


def test_probing_leaves_everything_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage(tmp_path / "not" / "yet").probe()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Storage(tmp_path / "file" / "below").probe()
    monkeypatch.setattr(layout, "free_bytes", lambda _: 1)
    with pytest.raises(StorageError, match="only 1 B free"):
        Storage(tmp_path / "not").probe()


def test_storage_is_made_and_checked(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "a" / "b")
    storage.check()
    assert storage.root.stat().st_mode & 0o777 == 0o700
    assert os.listdir(storage.root) == []


def test_storage_that_cannot_be_used_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        Storage(tmp_path / "file").check()
    with pytest.raises(StorageError, match=r"Not a directory"):
        Storage(tmp_path / "file" / "below").check()
    with pytest.raises(StorageError, match=r"Read-only.*make it writable"):
        Storage(tmp_path).check(disk=failing_disk(0, errno.EROFS))
    monkeypatch.setattr(layout, "free_bytes", lambda path: 1024)
    with pytest.raises(StorageError, match=r"only 1 KiB free, shoal needs 128 MiB.*free some space"):
        Storage(tmp_path).check()
    assert os.listdir(tmp_path) == ["file"]
