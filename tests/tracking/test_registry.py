"""Versions and aliases, on a real MLflow store in this process."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from shoal.errors import CorruptError, NotFoundError, RequestError, StorageError, TrackingError
from shoal.storage import Storage, commit, verify
from shoal.storage.owner import Owner
from shoal.tracking.registry import Registry, check_alias, parse_spec
from shoal.tracking.registry_store import RegistryStore


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path)


@pytest.fixture
def backend(open_mlflow, storage):
    store = open_mlflow()
    return RegistryStore(lambda: store, storage)


@pytest.fixture
def registry(backend, storage):
    return Registry(backend, storage)


def write(directory, version):
    commit(directory, lambda folder: (folder / "weights").write_text(f"v{version}") and None, meta={})


def a_dead_writer():
    dead = subprocess.run(
        [
            sys.executable,
            "-c",
            "from shoal.storage.owner import *; print(Owner.here().pid, Owner.here().started)",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()
    return asdict(Owner.here()) | {"pid": int(dead[0]), "started": int(dead[1])}


@pytest.mark.parametrize(
    "spec", ["", "@", "a@", "@3", "a@0", "a@-1", "a@03", "A", "a@B", "a@b@c", "a@latest", "a/b@1", "../x"]
)
def test_what_is_no_spec(spec):
    with pytest.raises(RequestError):
        parse_spec(spec)


def test_specs():
    assert parse_spec("digits") == ("digits", None)
    assert parse_spec("digits@3") == ("digits", "3")
    assert parse_spec("digits.v2-x@champion_1") == ("digits.v2-x", "champion_1")


@pytest.mark.parametrize("alias", ["latest", "v1", "3", "Champion", "", "a.b", "x" * 65, "a b"])
def test_what_is_no_alias(alias):
    with pytest.raises(RequestError, match="cannot be an alias"):
        check_alias(alias)


@pytest.mark.parametrize("name", ["", "a/b", "..", "A", "a:b", "-a", "x" * 81])
def test_what_is_no_model_name(name):
    with pytest.raises(RequestError, match="cannot name a model"):
        parse_spec(f"{name}@1")


@pytest.mark.slow
class TestOnMlflow:
    def test_versions_are_numbered_and_found_by_number_alias_and_name(self, registry, storage):
        first = registry.register("digits", write, run="digits-1", alias="champion")
        assert str(first) == "digits@1"
        assert first.path == storage.models_dir / "digits" / "1"
        assert (first.run, first.aliases) == ("digits-1", ("champion",))
        second = registry.register("digits", write)
        assert registry.resolve("digits").version == 2
        assert registry.resolve("digits@1") == first
        assert registry.resolve("digits@champion").version == 1
        assert [version.version for version in registry.versions("digits")] == [2, 1]
        assert verify(second.path).files.keys() == {"weights"}
        (model,) = registry.models()
        assert (model.model, model.latest, model.num_versions, model.aliases) == (
            "digits",
            2,
            2,
            {"champion": 1},
        )

    def test_an_alias_moves(self, registry):
        for _ in range(2):
            registry.register("digits", write, alias="champion")
        assert registry.resolve("digits@champion").version == 2
        assert registry.resolve("digits@1").aliases == ()
        registry.set_alias("digits", "champion", 1)
        assert registry.resolve("digits@champion").version == 1

    def test_what_does_not_exist_lists_what_does(self, registry):
        with pytest.raises(NotFoundError, match=r"models: none"):
            registry.resolve("digits")
        registry.register("digits", write, alias="champion")
        with pytest.raises(NotFoundError, match=r"no model 'digit'; did you mean digits"):
            registry.resolve("digit")
        with pytest.raises(
            NotFoundError, match=r"'champoin'; did you mean champion.*versions 1; aliases champion"
        ):
            registry.resolve("digits@champoin")
        with pytest.raises(NotFoundError, match=r"no version '7'"):
            registry.set_alias("digits", "champion", 7)
        assert registry.resolve("digits@champion").version == 1

    def test_a_write_that_fails_leaves_nothing(self, registry, storage):
        def fail(directory, version):
            raise ValueError("no weights")

        with pytest.raises(ValueError, match="no weights"):
            registry.register("digits", fail, alias="champion")
        with pytest.raises(StorageError, match="not registered"):
            registry.register("digits", lambda directory, version: directory.mkdir(parents=True))
        assert registry.models() == []
        with pytest.raises(NotFoundError):
            registry.versions("digits")
        assert not any(storage.models_dir.glob("*/[0-9]*/MANIFEST.json"))
        assert registry.register("digits", write).version == 3  # a number never means two things

    @pytest.mark.parametrize("committed", [False, True])
    def test_a_registration_cut_off_is_never_seen_and_collected_later(
        self, backend, registry, storage, committed
    ):
        registry.register("digits", write)
        writer = a_dead_writer()
        assert backend.reserve("digits", writer=writer, run=None) == 2
        if committed:
            write(storage.model_dir("digits", 2), 2)
        assert [version.version for version in registry.versions("digits")] == [1]
        with pytest.raises(NotFoundError):
            registry.resolve("digits@2")
        with pytest.raises(NotFoundError):
            registry.set_alias("digits", "champion", 2)
        assert registry.register("digits", write).version == 3
        assert not storage.model_dir("digits", 2).exists()
        assert [version.version for version in registry.versions("digits")] == [3, 1]

    def test_two_registrations_at_once_get_two_versions(self, backend, registry):
        writer = asdict(Owner.here())
        inner = []

        def write_slowly(directory, version):
            inner.append(registry.register("digits", write).version)
            write(directory, version)

        outer = registry.register("digits", write_slowly).version
        assert sorted([outer, *inner]) == [1, 2]
        assert backend.reserve("digits", writer=writer, run=None) == 3

    def test_files_of_a_version_that_mlflow_forgot_are_never_written_over(self, registry, storage):
        for version in (1, 2):
            write(storage.model_dir("digits", version), version)
        assert registry.register("digits", write).version == 3
        assert [version.version for version in registry.versions("digits")] == [3]
        assert (storage.model_dir("digits", 1) / "weights").read_text() == "v1"

    def test_a_number_whose_files_mlflow_forgot_is_given_up_without_them(
        self, backend, registry, storage, monkeypatch
    ):
        """The tracker dies, or the database is locked, while it passes over numbers that have files."""
        for version in (1, 2):
            write(storage.model_dir("digits", version), version)
        client = backend._store().client

        def locked(model, version):
            raise OSError("database is locked")

        with monkeypatch.context() as broken:
            broken.setattr(client, "delete_model_version", locked)
            with pytest.raises(TrackingError):
                backend.reserve("digits", writer=a_dead_writer(), run=None)
        assert registry.register("digits", write).version == 4
        backend.abandon("digits", 1)
        assert [verify(storage.model_dir("digits", number)).files for number in (1, 2)]
        assert (storage.model_dir("digits", 2) / "weights").read_text() == "v2"
        assert [version.version for version in registry.versions("digits")] == [4]

    def test_marking_ready_again_or_giving_up_a_ready_version_changes_nothing(self, backend, registry):
        registry.register("digits", write)
        backend.mark_ready("digits", 1)
        backend.abandon("digits", 1)
        backend.abandon("digits", 9)
        assert registry.resolve("digits").version == 1

    def test_a_version_is_not_ready_without_its_files(self, backend, registry, storage):
        version = backend.reserve("digits", writer=asdict(Owner.here()), run=None)
        with pytest.raises(StorageError, match="no committed model"):
            backend.mark_ready("digits", version)
        with pytest.raises(NotFoundError):
            registry.resolve("digits")

    def test_files_that_are_gone_are_named(self, registry):
        path = registry.register("digits", write).path
        path.rename(path.with_name("moved"))
        with pytest.raises(CorruptError, match="its files are gone"):
            registry.resolve("digits@1")
        assert registry.models()

    def test_threads_that_set_one_new_alias_all_get_their_way(self, backend, registry, monkeypatch):
        registry.register("digits", write)
        client, num_inside, most_inside = backend._store().client, 0, 0
        both_looked = threading.Event()
        set_alias = client.set_registered_model_alias

        def overlap(model, alias, version):
            nonlocal num_inside, most_inside
            num_inside += 1
            most_inside = max(most_inside, num_inside)
            if num_inside > 1:
                both_looked.set()
            both_looked.wait(0.2)  # a second one that is let in comes now
            set_alias(model, alias, version)
            num_inside -= 1

        monkeypatch.setattr(client, "set_registered_model_alias", overlap)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: registry.set_alias("digits", "champion", 1), range(3)))
        assert most_inside == 1
        assert registry.resolve("digits@champion").version == 1

    def test_the_database_is_for_its_owner_alone(self, migrated_db):
        assert stat.S_IMODE(migrated_db.stat().st_mode) == 0o600

    def test_bad_names_change_nothing(self, registry, storage):
        for arguments in ({"model": "A"}, {"model": "digits", "alias": "latest"}):
            with pytest.raises(RequestError):
                registry.register(arguments["model"], write, alias=arguments.get("alias"))
        assert registry.models() == []
        assert not storage.models_dir.exists()

    def test_a_new_tracker_process_knows_it_all(self, registry, open_mlflow, storage):
        registry.register("digits", write, alias="champion")
        store = open_mlflow()
        again = Registry(RegistryStore(lambda: store, storage), storage)
        assert again.resolve("digits@champion").version == 1


def test_tracking_that_is_down_is_said_and_nothing_is_written(storage):
    def down():
        raise TrackingError("tracking at http://127.0.0.1:9 does not answer")

    registry = Registry(RegistryStore(down, storage), storage)
    with pytest.raises(TrackingError, match="does not answer"):
        registry.register("digits", write)
    assert not storage.models_dir.exists()
