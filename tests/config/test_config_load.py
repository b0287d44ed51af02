"""Good files: defaults, the example, overrides, paths, YAML that means what it looks like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from config_reading import Read
from pydantic import ValidationError

from shoal.config import (
    ClusterConfig,
    Duration,
    Machine,
    Range,
    Size,
    find,
    is_loopback,
    load,
    notes,
    plan_local,
)
from shoal.errors import ConfigError

PROJECT = Path(__file__).parents[2]
LEAST = "version: 1\nname: x\n"


def test_two_lines_are_a_config_that_works_on_a_laptop(read: Read) -> None:
    config = read(LEAST)
    assert (config.train.workers, config.serve.host, config.target) == (Range(1, 1), "127.0.0.1", "local")
    assert config.serve.max_body == Size(8 * 2**20)
    assert config.train.checkpoint_every == Duration(30)
    assert notes(config) == []


def test_the_example_runs_as_it_is_on_two_cores_without_notes_or_gpus() -> None:
    machine = Machine(num_cpus=2, memory_bytes=4 * 2**30)
    config = load(PROJECT, env={}, machine=machine)
    assert config.train.workers == Range(1, 4)
    assert plan_local(config, machine).num_cpus == 4
    assert notes(config) == []
    first_line = (PROJECT / "cluster.yaml").read_text().splitlines()[0]
    assert first_line == "# yaml-language-server: $schema=.shoal/cluster.schema.json"


def test_configs_are_frozen_and_survive_their_dict(read: Read) -> None:
    config = read(
        LEAST + "pools: {gpu: {nodes: 0..8, cpu: 8, gpu: L4:2, idle: 5m}}\nserve: {reserve: {cpu: 1}}"
    )
    assert ClusterConfig.from_dict(config.as_dict()) == config
    assert config.as_dict()["pools"]["gpu"]["gpu"] == "L4:2"
    with pytest.raises(ValidationError):
        config.train.keep = 5  # type: ignore[misc]


def test_later_wins_file_environment_set_target(read: Read) -> None:
    text = LEAST + "train: {keep: 2, retries: 2}\ntune: {trials: 2}\ntargets: {k8s: {image: i}}"
    env = {"SHOAL_SET_TRAIN__KEEP": "3", "SHOAL_SET_TUNE__TRIALS": "3", "SHOAL_SETUP": "no", "PATH": "/"}
    config = read(text, env=env, overrides=["tune.trials=4", "target=onprem"], target="k8s")
    assert (config.train.retries, config.train.keep, config.tune.trials, config.target) == (2, 3, 4, "k8s")


def test_overrides_reach_what_the_file_leaves_out_and_are_read_as_yaml(read: Read) -> None:
    overrides = ["pools.big.cpu=64", "train.workers=1..2", "serve.reserve={cpu: 1}", "train.pool=null"]
    config = read(LEAST, overrides=overrides)
    assert config.pools["big"].cpu == 64
    assert config.train.workers == Range(1, 2)
    assert (config.serve.reserve.cpu, config.train.pool) == (1.0, None)


def test_the_process_environment_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster.yaml").write_text(LEAST)
    monkeypatch.setenv("SHOAL_SET_serve__port", "0")
    assert load(tmp_path).serve.port == 0


def test_an_override_changes_one_of_two_places_that_share_an_anchor(read: Read) -> None:
    text = LEAST + "pools:\n  a: &kind {cpu: 4}\n  b: *kind\n  c: {<<: *kind, nodes: 2}"
    config = read(text, overrides=["pools.a.cpu=8"])
    assert [config.pools[name].cpu for name in "abc"] == [8, 4, 4]


def test_a_mapping_may_override_what_it_merges(read: Read) -> None:
    config = read(LEAST + "pools:\n  a: &kind {cpu: 4, memory: 8Gi}\n  b: {<<: *kind, cpu: 16}")
    assert [(pool.cpu, pool.memory) for pool in config.pools.values()] == [(4, 8 * 2**30), (16, 8 * 2**30)]


def test_the_file_is_found_upward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster.yaml").write_text(LEAST)
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert find() == find(tmp_path) == tmp_path.resolve() / "cluster.yaml"
    assert load(env={}).name == "x"


def test_no_file_says_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none in .* or any folder above it; .* `name: my-cluster`"):
        find(tmp_path)


def test_paths_are_relative_to_the_project(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    config = read(LEAST + "storage: data/runs\nserve: {keys_file: keys.txt}")
    assert config.storage_path(tmp_path) == tmp_path / "data/runs"
    assert config.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/data/runs/tracking/mlflow.db"
    assert config.keys_path(tmp_path) == tmp_path / "keys.txt"
    assert read(LEAST).keys_path(tmp_path) is None
    config = read(LEAST + "storage: /mnt/x\ntracking: sqlite:///m.db")
    assert config.storage_path(tmp_path) == Path("/mnt/x")
    assert config.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/m.db"
    assert read(LEAST + "tracking: http://h:5000").tracking_uri(tmp_path) == "http://h:5000"


def test_yaml_means_what_it_looks_like(read: Read) -> None:
    config = read("version: 1\nname: no\ntrain: {retries: 010}\nserve: {reserve: {cpu: 5e-1}}")
    assert (config.name, config.train.retries, config.serve.reserve.cpu) == ("no", 10, 0.5)
    assert read("version: 1\nname: x\nstorage: 2026-01-01").storage == "2026-01-01"


def test_notes_name_what_is_set_and_waits_never_a_default(read: Read) -> None:
    text = LEAST + (
        "pools: {cpu: {cpu: 8, spot: true, idle: 5m}}\ntrain: {priority: 50}\n"
        "serve: {reserve: {cpu: 1}}\ntarget: k8s\ntargets: {k8s: {image: i}}"
    )
    assert notes(read(text)) == [
        "target: k8s is checked, but only local can be started yet",
        "pools.cpu.spot: checked, but nothing acts on it yet",
        "pools.cpu.idle: checked, but nothing acts on it yet",
        "train.priority: checked, but nothing acts on it yet",
        "serve.reserve: checked, but nothing acts on it yet",
        "targets.k8s: checked, but nothing acts on it yet",
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "localhost.example.com", "my-laptop"])
def test_reachable_by_others(host: str, read: Read) -> None:
    assert not is_loopback(host)
    assert read(LEAST + f'serve: {{host: "{host}", keys_file: keys}}').serve.host == host


def test_import_is_light() -> None:
    code = (
        "import sys, shoal.config; print(*{'torch', 'ray', 'mlflow', 'pandas', 'numpy'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(PROJECT / "platform")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
