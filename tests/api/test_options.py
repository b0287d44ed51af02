"""How a run and a sweep are asked for: wrong values are refused by name, and every door has the same options."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from projects import write_project
from shoal import Cluster
from shoal.cli.train import train
from shoal.cli.tune import tune
from shoal.config import Range, load
from shoal.errors import RequestError
from shoal.storage import Storage
from shoal.train.options import RunOptions, plan_run
from shoal.tune import SweepOptions, start_sweep
from shoal.tune.space import loguniform
from toy import Toy

SHARED = [
    ("steps", 1.5, "1 or more, such as 2000"),
    ("steps", True, "1 or more, such as 2000"),
    ("steps", "5", "1 or more, such as 2000"),
    ("steps", 0, "1 or more, such as 2000"),
    ("seed", "x", "a whole number, such as 7"),
    ("seed", 1.0, "a whole number, such as 7"),
    ("seed", None, "a whole number, such as 7"),
    ("name", 3, "a text, such as 'first-try'"),
    ("precision", "fp16", "'fp32' or 'bf16'"),
    ("precision", ["bf16"], "'fp32' or 'bf16'"),
    ("checkpoint_every", float("nan"), "such as 30, or a text with a unit, such as '30s'"),
    ("checkpoint_every", float("inf"), "such as 30, or a text with a unit, such as '30s'"),
    ("checkpoint_every", -1, "such as 30, or a text with a unit, such as '30s'"),
    ("checkpoint_every", 0, "such as 30, or a text with a unit, such as '30s'"),
    ("checkpoint_every", True, "such as 30, or a text with a unit, such as '30s'"),
    ("checkpoint_every", "30", "such as 30, or a text with a unit, such as '30s'"),
    ("checkpoint_every", "often", "such as '30s'; or 'auto'"),
    ("checkpoint_every", [30], "such as 30, or a text with a unit, such as '30s'"),
]
OF_A_RUN = [
    *SHARED,
    ("workers", True, "such as 2, or a range, such as '1..4'"),
    ("workers", 1.5, "such as 2, or a range, such as '1..4'"),
    ("workers", "4..1", "such as 2, or a range, such as '1..4'"),
    ("workers", "0..2", "at least 1 worker"),
    ("keep", True, "1 or more, such as 3"),
    ("keep", 0, "1 or more, such as 3"),
    ("keep_best", 0, "1 or more, such as 3"),
    ("exact", 1, "True or False"),
    ("shards", 0, "1 or more, such as 8"),
    ("micro_batch", 0, "1 or more, such as 8"),
    ("strategy", "zero", "'ddp', 'fsdp' or 'hybrid'"),
    ("on_nan", "ignore", "'fail', 'skip' or 'rollback'"),
    ("init_from", 1, "such as 'digits@1'"),
]
OF_A_SWEEP = [
    *SHARED,
    ("trials", 0, "from 1 to 999, such as 16"),
    ("trials", 1000, "from 1 to 999, such as 16"),
    ("trials", "8", "from 1 to 999, such as 16"),
    ("concurrent", 0, "1 or more, such as 4"),
    ("workers", "1..4", "1 or more, such as 2"),
    ("workers", True, "1 or more, such as 2"),
    ("scheduler", "median", "'asha', 'pbt' or 'none'"),
    ("perturb_every", 0.5, "1 or more, such as 100"),
    ("cpus_per_worker", float("nan"), "0 or more, such as 1"),
    ("cpus_per_worker", "1", "0 or more, such as 1"),
    ("gpus_per_worker", -1, "0 or more, such as 1"),
    ("retries", -1, "0 or more, such as 3"),
    ("retries", True, "0 or more, such as 3"),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A handle that is enough to ask with; nothing runs."""
    project = write_project(tmp_path)
    info: Any = SimpleNamespace(
        config=load(project).as_dict(), storage=project / ".shoal", project=project, num_gpus=0
    )
    return Cluster(info)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was started: each call's arguments."""
    calls: list[Any] = []
    for place in ("shoal.train.driver.launch", "shoal.tune.start_sweep"):
        monkeypatch.setattr(place, lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


@pytest.mark.parametrize(("option", "value", "valid"), OF_A_RUN)
def test_a_wrong_option_of_a_run_is_named_with_what_would_do(
    cluster: Cluster, launched: list[Any], option: str, value: Any, valid: str
) -> None:
    with pytest.raises(RequestError) as caught:
        cluster.train(Toy(), **{option: value})
    assert str(caught.value).startswith(f"{option}={value!r}: ")
    assert valid in str(caught.value)
    assert not launched


@pytest.mark.parametrize(("option", "value", "valid"), OF_A_SWEEP)
def test_a_wrong_option_of_a_sweep_is_named_with_what_would_do(
    cluster: Cluster, launched: list[Any], option: str, value: Any, valid: str
) -> None:
    with pytest.raises(RequestError) as caught:
        cluster.tune(Toy(), {"lr": loguniform(1e-3, 1e-1)}, **{option: value})
    assert str(caught.value).startswith(f"{option}={value!r}: ")
    assert valid in str(caught.value)
    assert not launched


def test_every_wrong_option_is_named_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        SweepOptions(trials=0, concurrent=0, workers=0, cpus_per_worker=-1, scheduler="median")  # type: ignore[arg-type]
    _, *lines = str(caught.value).splitlines()
    assert [line.split("=")[0].strip() for line in lines] == [
        "trials", "concurrent", "workers", "scheduler", "cpus_per_worker",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "pbt", "workers": 2}, "population have one worker each"),
        ({"perturb_every": 10}, "only scheduler='pbt' perturbs"),
        ({"cpus_per_worker": 0, "gpus_per_worker": 0}, "holds a CPU or a GPU"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SweepOptions(**options)


def test_what_a_sweep_takes_from_the_file_is_checked_too(tmp_path: Path, cluster: Cluster) -> None:
    cluster.info.config["tune"]["trials"] = 1000
    with pytest.raises(RequestError, match="trials=1000: a whole number from 1 to 999"):
        start_sweep(cluster.info, Toy(), {"lr": loguniform(1e-3, 1e-1)})
    assert not cluster.storage.root.exists()


def test_the_steps_of_the_recipe_are_checked_too(cluster: Cluster) -> None:
    class Endless(Toy):
        steps = 0

    with pytest.raises(RequestError, match=r"Endless\.steps=0: a whole number, 1 or more"):
        cluster.plan(Endless(), RunOptions())


@pytest.mark.parametrize("options", [{"steps": 1.5}, {"seed": "x"}])
def test_a_recipe_that_is_fitted_here_checks_them_too(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="a whole number"):
        Toy().fit(**options)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, 30.0), (5, 5.0), (0.05, 0.05), ("30s", 30.0), ("250ms", 0.25), ("auto", None)],
)
def test_a_time_between_checkpoints_is_seconds_or_text(
    cluster: Cluster, given: Any, seconds: float | None
) -> None:
    assert cluster.plan(Toy(), RunOptions(checkpoint_every=given)).checkpoint_every_s == seconds


@pytest.mark.parametrize("seed", [-1, 0, 2**70])
def test_any_whole_number_is_a_seed(cluster: Cluster, seed: int) -> None:
    assert cluster.plan(Toy(), RunOptions(seed=seed)).identity()["seed"] == seed


def options_of(function: Any) -> dict[str, Any]:
    """Its parameters that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("kind", "in_python", "on_the_shell", "only_there", "only_in_python"),
    [
        (RunOptions, Cluster.train, train, {"fields", "detach", "dry_run"}, set()),
        (SweepOptions, Cluster.tune, tune, {"space"}, {"cpus_per_worker", "gpus_per_worker", "retries"}),
    ],
)
def test_every_door_has_the_same_options_with_the_same_defaults(
    kind: Any, in_python: Any, on_the_shell: Any, only_there: set[str], only_in_python: set[str]
) -> None:
    known = {field.name: field.default for field in fields(kind)}
    assert MISSING not in known.values()
    assert options_of(in_python) == known
    shell = options_of(on_the_shell)
    assert shell.keys() == (known.keys() | only_there) - only_in_python
    assert all(default == shell[name] for name, default in known.items() if name in shell)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 4}, "only an exact run has shards; add exact=True"),
        ({"exact": False, "shards": 4}, "only an exact run has shards"),
        (
            {"exact": True, "shards": 13},
            "a batch of 12 samples cannot be divided into 13 shards; set shards=12",
        ),
        ({"exact": True, "strategy": "fsdp"}, "an exact run takes ddp"),
        (
            {"exact": True, "shards": 4, "micro_batch": 2},
            "an exact run takes its batch in shards; .* shards=4",
        ),
    ],
)
def test_what_does_not_go_with_exact_or_without_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    config = load(write_project(tmp_path))
    with pytest.raises(RequestError, match=message):
        plan_run(Toy(), RunOptions(**options), config, Storage(tmp_path), project=tmp_path)


def test_an_exact_run_has_at_most_as_many_workers_as_shards(tmp_path: Path) -> None:
    config = load(write_project(tmp_path))
    assert RunOptions(workers="2..9", exact=True, shards=4).worker_range(config) == Range(2, 4)
    assert RunOptions(workers="2..9").worker_range(config) == Range(2, 9)
    with pytest.raises(RequestError, match=r"workers=5\.\.9: an exact run of 4 shards takes 1 to 4 workers"):
        RunOptions(workers="5..9", exact=True, shards=4).worker_range(config)


def test_what_the_file_says_is_the_default_of_exact(tmp_path: Path) -> None:
    config = load(write_project(tmp_path, extra="train: {exact: true, shards: 6}\n"))
    assert RunOptions().num_shards(config) == 6
    assert RunOptions(shards=3).num_shards(config) == 3
    assert RunOptions(exact=False).num_shards(config) is None


def test_a_sweeps_trials_stay_fast_whatever_the_file_says_of_runs(tmp_path: Path) -> None:
    config = load(write_project(tmp_path, extra="train: {exact: true, shards: 6}\n"))
    assert SweepOptions().of_a_trial().num_shards(config) is None
