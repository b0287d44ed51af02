"""What we use of Ray Tune beyond its public names, and sweeps on a real cluster."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import searched
from searched import Line

import shoal
from shoal.errors import RecipeError, RequestError
from shoal.recipe import minimize
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from shoal.tune import Sweep, SweepOptions, TrialState, start_sweep
from shoal.tune.record import SweepRecord, run_of
from shoal.tune.space import choice, loguniform
from waiting import DEADLINE_S, wait_until

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo

SPACE = {"lr": loguniform(1e-3, 1e-1)}
SEED_THAT_BEGINS_WITH_THE_FIRST = 0
"""Of a search that tries the first of two choices first."""
HERE = Path(__file__).resolve().parent


def wait_for_victim(folder: Path) -> int:
    """The process that came half way and waits to be killed."""
    flag = folder / "victim"
    wait_until(lambda: flag.exists() and flag.read_text().endswith("\n"), "a trial to come half way")
    return int(flag.read_text())


# What an upgrade of Ray may move


def test_tune_still_makes_its_actors_with_the_class_we_replace() -> None:
    from ray.tune.execution import class_cache, tune_controller

    assert issubclass(tune_controller._ActorClassCache, class_cache._ActorClassCache), (
        "TuneController makes actor classes in another way now: see ray_edge._ActorClasses"
    )
    import inspect

    assert "self._class_cache.get(trainable_cls)" in inspect.getsource(tune_controller.TuneController), (
        "TuneController no longer asks its class cache: trials get a runtime environment and a fresh process again"
    )


def test_an_empty_head_leaves_one_bundle_for_each_worker() -> None:
    from ray import tune

    factory = tune.PlacementGroupFactory([{}, {"CPU": 1}, {"CPU": 1}])
    assert (factory.bundles, factory.head_bundle_is_empty) == ([{"CPU": 1}, {"CPU": 1}], True), (
        "bundle n of a trial's placement group is no longer worker n's: see ray_edge.run_trials"
    )


def test_asha_catches_up_on_trials_that_are_done() -> None:
    """Rungs at 20 (a ninth of 180) and 60: trials of an earlier driver fill them."""
    from types import SimpleNamespace

    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

    from shoal.tune import ray_edge

    past = [(number, step, value) for number, value in enumerate((0.9, 0.8, 0.7)) for step in (20, 60)]
    scheduler = ray_edge.make_scheduler("asha", shoal.maximize("a"), steps=180, eval_every=20, past=past)
    assert isinstance(scheduler, ASHAScheduler)
    trial = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)
    decision = scheduler.on_trial_result(None, trial, {"step": 20, ray_edge._METRIC: 0.1})
    assert decision == TrialScheduler.STOP
    best = SimpleNamespace(trial_id="best")
    scheduler.on_trial_add(None, best)
    decision = scheduler.on_trial_result(None, best, {"step": 20, ray_edge._METRIC: 0.95})
    assert decision == TrialScheduler.CONTINUE
    for kind, steps in (("none", 180), ("asha", 20)):
        never = ray_edge.make_scheduler(kind, shoal.maximize("a"), steps=steps, eval_every=20, past=[])
        assert type(never) is FIFOScheduler


# On a cluster


@pytest.fixture
def by_value() -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(searched)  # a cluster's processes have no tests on their path


@pytest.mark.cluster
@pytest.mark.usefixtures("by_value")
def test_a_sweep_finds_the_better_fields(cluster: ClusterInfo) -> None:
    space = {**SPACE, "kind": choice(["plain", "broken"])}
    sweep = start_sweep(
        cluster, Line(), space, SweepOptions(trials=8, concurrent=3, name="finds", steps=60)
    ).wait(progress=False)
    states = [trial.state for trial in sweep.trials]
    assert len(states) == 8
    assert TrialState.FINISHED in states
    assert all(state.is_final for state in states)
    for trial in sweep.trials:
        run = RunRecord(Storage(cluster.storage), trial.run)
        if trial.fields["kind"] == "broken":
            assert trial.state is TrialState.FAILED
            assert "this model cannot be built" in trial.error
            continue
        wait_until(lambda run=run: run.state() is not RunState.RUNNING, f"{trial} to end")  # type: ignore[misc]
        assert run.state() in (RunState.FINISHED, RunState.STOPPED)
        assert run.events(("checkpoint",))[-1]["step"] == run.step
    assert sweep.best.value == min(trial.value for trial in sweep.trials if trial.value is not None)
    assert not math.isnan(sweep.best.value or math.nan)
    assert sorted(path.name for path in SweepRecord(Storage(cluster.storage), "finds").dir.iterdir()) == [
        "lock",
        "sweep.json",
        "trials.jsonl",
    ]
    again = start_sweep(cluster, Line(), space, SweepOptions(trials=8, concurrent=3, name="finds", steps=60))
    assert again.wait(progress=False).trials == sweep.trials
    assert "8 of 8 trials done" in again.note


@pytest.mark.cluster
@pytest.mark.usefixtures("by_value")
def test_a_killed_trial_goes_on_from_its_checkpoint(cluster: ClusterInfo, tmp_path: Path) -> None:
    sweep = start_sweep(
        cluster,
        Line(flag_dir=str(tmp_path)),
        SPACE,
        SweepOptions(trials=2, concurrent=2, name="killed-trial", scheduler="none"),
    )
    os.kill(wait_for_victim(tmp_path), signal.SIGKILL)
    sweep.wait(progress=False, timeout_s=DEADLINE_S)
    assert [trial.state for trial in sweep.trials] == [TrialState.FINISHED] * 2
    runs = [RunRecord(Storage(cluster.storage), trial.run) for trial in sweep.trials]
    assert sorted(run.attempt for run in runs) == [1, 2]
    killed = max(runs, key=lambda run: run.attempt)
    committed = [line["step"] for line in killed.events(("checkpoint",)) if line["attempt"] == 1]
    resumed = killed.events(("start",))[-1]
    assert resumed["source"] == "checkpoint"
    # Not ==: the one of the step at which it was killed may have been committed without its line in the journal.
    assert committed[-1] <= resumed["step"] <= Line.steps // 2


@pytest.fixture
def nothing_left(cluster: ClusterInfo) -> Iterator[None]:
    """After the test no placement group and no actor is there that was not before, and as many CPUs are free."""
    import ray
    from ray.util.placement_group import placement_group_table
    from ray.util.state import list_actors

    def actors() -> set[str]:
        return {actor.actor_id for actor in list_actors(filters=[("state", "=", "ALIVE")], limit=1000)}

    def groups() -> set[str]:
        return {key for key, group in placement_group_table().items() if group["state"] != "REMOVED"}

    def free() -> float:
        return float(ray.available_resources().get("CPU", 0))

    # What tests before this one left is on its way out: it may be gone after it, but nothing may have come.
    before = (actors(), groups(), free())
    yield
    wait_until(lambda: actors() <= before[0] and groups() <= before[1], "every actor and group to be gone")
    wait_until(lambda: free() >= before[2], "all CPUs to be free")


def start_pair(cluster: ClusterInfo, folder: Path, *, name: str) -> Sweep:
    """One trial on two workers, of which one waits half way to be killed."""
    return start_sweep(
        cluster,
        Line(flag_dir=str(folder)),
        SPACE,
        SweepOptions(trials=1, concurrent=1, workers=2, name=name, scheduler="none"),
    )


@pytest.mark.cluster
@pytest.mark.usefixtures("by_value", "nothing_left")
class TestTrialsOfTwoWorkers:
    def test_more_trials_than_fit_all_finish(self, cluster: ClusterInfo) -> None:
        sweep = start_sweep(
            cluster,
            Line(),
            SPACE,
            SweepOptions(trials=3, concurrent=3, workers=2, name="pairs", scheduler="none"),
        )
        assert "2 at a time instead of 3" in sweep.note
        sweep.wait(progress=False, timeout_s=180)
        assert [trial.state for trial in sweep.trials] == [TrialState.FINISHED] * 3
        for trial in sweep.trials:
            run = RunRecord(Storage(cluster.storage), trial.run)
            (start,) = run.events(("start",))
            assert (start["workers"], len(set(start["pids"]))) == (2, 2)
            best = run.best(minimize("error"))
            assert best is not None
            assert (trial.value, trial.step) == (best["values"]["error"], 40)

    def test_a_worse_trial_commits_and_ends_early(self, cluster: ClusterInfo) -> None:
        """They come one after the other; at 1e-7 nothing is learned."""
        sweep = start_sweep(
            cluster,
            Line(eval_every=100),
            {"lr": choice([1e-1, 1e-7])},
            SweepOptions(
                trials=2,
                concurrent=1,
                workers=2,
                name="pruned-pair",
                seed=SEED_THAT_BEGINS_WITH_THE_FIRST,
                steps=3_000,
            ),
        ).wait(progress=False, timeout_s=180)
        better, worse = sweep.trials
        assert (better.state, better.fields["lr"]) == (TrialState.FINISHED, 1e-1)
        assert worse.state is TrialState.PRUNED
        run = RunRecord(Storage(cluster.storage), worse.run)
        wait_until(lambda: run.state() is not RunState.RUNNING, "its workers to stop")
        assert run.state() is RunState.STOPPED
        assert run.events(("checkpoint",))[-1]["step"] == run.step
        assert 0 < run.step < 3_000

    def test_a_killed_worker_is_replaced_where_it_was(
        self, cluster: ClusterInfo, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        from ray.util.placement_group import placement_group_table

        def rooms() -> set[str]:
            return {name for name, group in placement_group_table().items() if group["state"] == "CREATED"}

        sweep = start_pair(cluster, tmp_path, name="killed-worker")
        run = RunRecord(Storage(cluster.storage), run_of("killed-worker", 1))
        victim = wait_for_victim(tmp_path)
        wait_until(lambda: bool(run.events(("checkpoint",))), "a commit to go on from")
        before = rooms()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: run.attempt == 2, "the workers to start again")
        assert (rooms(), len(before)) == (before, 1)
        sweep.wait(progress=False, timeout_s=120)
        assert [trial.state for trial in sweep.trials] == [TrialState.FINISHED]
        first, second = run.events(("start",))
        assert victim in first["pids"]
        assert second["source"] == "checkpoint"
        assert second["step"] in (10, 20)  # killed at 20, whose checkpoint the other worker may have written
        assert capfd.readouterr() == ("", "")

    def test_a_killed_trial_takes_its_workers_with_it(self, cluster: ClusterInfo, tmp_path: Path) -> None:
        from ray.util.state import list_actors

        def actors() -> set[int]:
            return {actor.pid for actor in list_actors(filters=[("state", "=", "ALIVE")], limit=1000)}

        others = actors()  # of Serve, say, which an earlier test started
        sweep = start_pair(cluster, tmp_path, name="killed-pair")
        run = RunRecord(Storage(cluster.storage), run_of("killed-pair", 1))
        wait_for_victim(tmp_path)
        wait_until(lambda: bool(run.events(("checkpoint",))), "a commit to go on from")
        trial = json.loads(run.driver_lock_path.read_text())["pid"]
        old = actors() - others
        assert old > {trial, *run.events(("start",))[0]["pids"]}  # and their controller
        os.kill(trial, signal.SIGKILL)
        wait_until(lambda: not any(map(psutil.pid_exists, old)), "its controller and workers to be gone")
        sweep.wait(progress=False, timeout_s=120)
        assert [trial.state for trial in sweep.trials] == [TrialState.FINISHED]
        assert run.events(("start",))[-1]["source"] == "checkpoint"


@pytest.mark.cluster
@pytest.mark.slow
def test_a_killed_driver_repeats_no_finished_trial(cluster: ClusterInfo, tmp_path: Path) -> None:
    from drive import start

    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1] / 'platform'}"}
    (tmp_path / "victim").touch()  # the first trial runs through
    record = SweepRecord(Storage(cluster.storage), "killed-driver")

    def has_finished(count: int) -> bool:
        return sum(trial.state is TrialState.FINISHED for trial in record.trials()) >= count

    command = [sys.executable, str(HERE / "drive.py"), str(cluster.project), str(tmp_path)]
    with subprocess.Popen(command, env=environment) as driver:
        try:
            wait_until(lambda: has_finished(1), "the first trial to finish")
            (tmp_path / "victim").unlink()
            wait_until(lambda: (tmp_path / "victim").exists(), "another to come half way")
            with pytest.raises(RequestError, match="is being run already"):
                start(cluster, str(tmp_path))
        finally:
            driver.kill()
    before = {trial.number: trial for trial in record.trials() if trial.state.is_final}
    sweep = start(cluster, str(tmp_path)).wait(progress=False, timeout_s=DEADLINE_S)
    assert isinstance(sweep, Sweep)
    assert [trial.state for trial in sweep.trials] == [TrialState.FINISHED] * 3
    attempts = {
        trial.number: RunRecord(Storage(cluster.storage), trial.run).attempt for trial in sweep.trials
    }
    assert all(attempts[number] == 1 for number in before)
    assert sorted(attempts.values()) == [1, 1, 2]
    assert {number: trial for number, trial in enumerate(sweep.trials, 1) if number in before} == before


@pytest.mark.cluster
@pytest.mark.usefixtures("by_value")
def test_stopping_commits_and_the_same_call_goes_on(cluster: ClusterInfo) -> None:
    def start(steps: int) -> Sweep:
        return start_sweep(
            cluster,
            Line(),
            SPACE,
            SweepOptions(trials=2, concurrent=1, name=f"stopped-{steps}", scheduler="none", steps=steps),
        )

    sweep = start(1_000_000)
    wait_until(
        lambda: any(trial.step >= 20 for trial in sweep.trials), "the first trial to be measured twice"
    )
    sweep.stop()
    sweep.wait(progress=False, timeout_s=DEADLINE_S)
    assert [trial.state for trial in sweep.trials] == [TrialState.STOPPED]
    run = RunRecord(Storage(cluster.storage), sweep.trials[0].run)
    assert run.state() is RunState.STOPPED
    assert run.events(("checkpoint",))[-1]["step"] == run.step
    again = start(1_000_000)
    wait_until(lambda: run.attempt == 2, "the trial to go on")
    assert again.trials[0].run == run.name
    again.stop()
    again.wait(progress=False, timeout_s=DEADLINE_S)


@pytest.mark.cluster
@pytest.mark.usefixtures("by_value")
def test_a_full_cluster_delays_a_sweep_and_it_can_still_be_stopped(cluster: ClusterInfo) -> None:
    def start(name: str) -> Sweep:
        space = {"width": choice([1, 2])}
        return start_sweep(
            cluster,
            Line(),
            space,
            SweepOptions(
                trials=9,
                concurrent=9,
                name=name,
                scheduler="none",
                steps=1_000_000,
                cpus_per_worker=cluster.num_cpus,
            ),
        )

    first = start("fills")
    assert "2 trials instead of 9" in first.note
    assert "1 at a time instead of 9" in first.note
    wait_until(lambda: any(trial.step > 0 for trial in first.trials), "the cluster to be full")
    second = start("waits")
    wait_until(lambda: len(second.trials) > 0, "the second sweep to ask for room")
    assert second.trials[0].state is TrialState.WAITING
    second.stop()
    second.wait(progress=False, timeout_s=DEADLINE_S)
    assert {trial.state for trial in second.trials} == {TrialState.STOPPED}
    first.stop()
    first.wait(progress=False, timeout_s=DEADLINE_S)


@pytest.mark.cluster
@pytest.mark.usefixtures("by_value")
def test_a_recipe_that_fails_is_an_error(cluster: ClusterInfo) -> None:
    sweep = start_sweep(
        cluster, Line(kind="broken"), SPACE, SweepOptions(trials=9, concurrent=2, name="fails")
    )
    with pytest.raises(RecipeError, match=r"trials failed.*\n?.*this model cannot be built"):
        sweep.wait(progress=False, timeout_s=DEADLINE_S)
    assert len(sweep.trials) < 9


@pytest.mark.cluster
def test_what_never_fits_is_refused_before_anything_is_written(cluster: ClusterInfo) -> None:
    with pytest.raises(RequestError, match="can never start"):
        start_sweep(
            cluster, Line(), SPACE, SweepOptions(trials=2, concurrent=2, name="huge", cpus_per_worker=1000)
        )
    with pytest.raises(
        RequestError, match="3 workers with 2 CPU each can never start: the cluster has 4 CPU"
    ):
        start_sweep(
            cluster,
            Line(),
            SPACE,
            SweepOptions(trials=2, concurrent=2, name="huge", workers=3, cpus_per_worker=2),
        )
    assert not SweepRecord(Storage(cluster.storage), "huge").dir.exists()
