"""What we use of Ray Tune's population-based training beyond its public names, and a population on a cluster."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import searched
from drive import start_population
from searched import Line, Member

import shoal
from shoal.errors import NotFoundError, RequestError
from shoal.storage import Storage
from shoal.tracking import RunRecord
from shoal.tune import SweepOptions, TrialState, start_sweep
from shoal.tune.record import SweepRecord
from shoal.tune.space import loguniform, randint
from waiting import wait_until

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo

SPACE = {"lr": loguniform(1e-4, 1e-1)}
HERE = Path(__file__).resolve().parent


# What an upgrade of Ray may move


class Exploits:
    """Stands in for the sweep's trials: every exploit is granted, or none."""

    def __init__(self, *, fails: bool = False) -> None:
        self.made: list[tuple[int, int]] = []
        self._fails = fails

    def exploit(self, loser: int, winner: int) -> object | None:
        if self._fails:
            raise NotFoundError("no checkpoint")
        self.made.append((loser, winner))
        return object()


class TuneTrial:
    """As much of Tune's trial as a scheduler looks at."""

    def __init__(self, number: int, step: int = 0) -> None:
        self.trial_id, self.experiment_tag, self.status = f"t{number}", str(number), "RUNNING"
        self.config = {"trial": number, "step": step}
        settings = SimpleNamespace(num_to_keep=None)
        self.run_metadata = SimpleNamespace(checkpoint_manager=SimpleNamespace(checkpoint_config=settings))

    def is_finished(self) -> bool:
        return self.status == "TERMINATED"


def make_population(exploits: Exploits, *steps: int) -> tuple[Any, list[TuneTrial]]:
    from shoal.tune import ray_edge

    population = ray_edge.make_population(exploits, shoal.maximize("a"), interval=20)  # type: ignore[arg-type]
    trials = [TuneTrial(number, step) for number, step in enumerate(steps, 1)]
    for trial in trials:
        population.on_trial_add(None, trial)
    return population, trials


def report(population: Any, trial: TuneTrial, step: int, value: float) -> str:
    from shoal.tune import ray_edge

    return str(population.on_trial_result(None, trial, {"step": step, ray_edge._METRIC: value}))


def test_a_trial_among_the_worst_is_stopped_for_a_copy_of_one_among_the_best() -> None:
    exploits = Exploits()
    population, trials = make_population(exploits, 0, 0, 0, 0)
    decisions = [report(population, trial, 20, 0.9 - trial.config["trial"] / 10) for trial in trials]
    assert decisions == ["CONTINUE", "STOP", "STOP", "STOP"]  # each is the worst of those measured so far
    assert exploits.made == [(2, 1), (3, 1), (4, 1)]
    assert report(population, trials[0], 30, 0.1) == "CONTINUE"  # 10 steps later: not yet


def test_a_trial_is_compared_an_interval_after_the_step_it_began_at() -> None:
    exploits = Exploits()
    population, (first, second) = make_population(exploits, 0, 30)
    report(population, first, 40, 0.9)
    assert report(population, second, 40, 0.1) == "CONTINUE"
    assert report(population, second, 50, 0.1) == "STOP"


def test_nobody_is_paused_for_trials_that_wait_and_an_exploit_that_fails_is_none() -> None:
    population, trials = make_population(Exploits(fails=True), 0, 0, 0)
    trials[2].status = "PENDING"
    assert report(population, trials[0], 20, 0.9) == "CONTINUE"
    assert report(population, trials[1], 20, 0.1) == "CONTINUE"


def test_a_trial_whose_process_died_is_still_known() -> None:
    exploits = Exploits()
    population, (first, second) = make_population(exploits, 0, 0)
    report(population, first, 20, 0.9)
    report(population, second, 20, 0.95)
    population.on_trial_add(None, second)
    assert report(population, second, 30, 0.1) == "CONTINUE"
    assert population.has_live
    first.status = second.status = "TERMINATED"
    assert not population.has_live


def test_rays_scheduler_still_asks_the_method_we_replace() -> None:
    from ray.tune.schedulers import PopulationBasedTraining

    source = inspect.getsource(PopulationBasedTraining.on_trial_result)
    assert "self._checkpoint_or_exploit(\n                trial, tune_controller, upper_quantile" in source, (
        "PopulationBasedTraining carries out an exploit in another way now: see tune/ray_population.py"
    )
    assert "tune_controller.search_alg" in inspect.getsource(PopulationBasedTraining.on_trial_add), (
        "PopulationBasedTraining no longer refuses a sampler: ray_population._ALONE can go"
    )


# On a cluster


@pytest.fixture
def by_value() -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(searched)  # a cluster's processes have no tests on their path


@pytest.mark.cluster
@pytest.mark.usefixtures("by_value")
def test_an_exploit_goes_on_from_the_winners_weights_with_fields_of_its_own(
    cluster: ClusterInfo, tmp_path: Path
) -> None:
    def start() -> Any:
        return start_population(cluster, str(tmp_path), name="population")

    sweep = start().wait(progress=False, timeout_s=200)
    trials = {trial.run: trial for trial in sweep.trials}
    replacing = [trial for trial in trials.values() if trial.source is not None]
    assert replacing
    assert {trial.state for trial in trials.values()} == {TrialState.FINISHED, TrialState.PRUNED}
    assert sum(trial.state is TrialState.FINISHED for trial in trials.values()) == 4
    assert sorted(trial.replaced_by for trial in trials.values() if trial.replaced_by) == [
        trial.run for trial in replacing
    ]
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    for trial in replacing:
        assert trial.source is not None
        run = RunRecord(Storage(cluster.storage), trial.run)
        identity = run.identity()
        assert identity is not None
        assert identity["source"] == {
            "run": trial.source.run,
            "step": trial.source.step,
            "digest": trial.source.digest,
        }
        start_line = run.events(("start",))[0]
        assert (start_line["step"], start_line["source"]) == (trial.source.step, "adopted")
        if trial.source.step == 200:  # a copy of one that was done has no step left
            continue
        assert {event["values"]["lr"] for event in run.events(("metrics",))} == {trial.fields["lr"]}
        winner = trials[trial.source.run]

        def weights(lr: float, step: int, *, begins: bool | None = None) -> set[str]:
            """What runs of that field had at that step: more than one run may, after 0.8 * 1.2 and 1.2 * 0.8."""
            here = [s for s in seen if (s["lr"], s["step"]) == (lr, step)]
            return {s["weights"] for s in here if begins is None or s["begins"] is begins}

        begun = weights(trial.fields["lr"], trial.source.step, begins=True)
        assert begun & weights(winner.fields["lr"], trial.source.step)
    assert sweep.best.value == min(trial.value for trial in trials.values() if trial.value is not None)
    again = start().wait(progress=False, timeout_s=60)
    assert again.trials == sweep.trials
    assert len(seen) == len((tmp_path / "seen.jsonl").read_text().splitlines())


@pytest.mark.cluster
@pytest.mark.slow
def test_a_killed_driver_repeats_no_finished_member_of_a_population(
    cluster: ClusterInfo, tmp_path: Path
) -> None:
    record = SweepRecord(Storage(cluster.storage), "killed-population")
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1] / 'platform'}"}
    command = [sys.executable, str(HERE / "drive.py"), str(cluster.project), str(tmp_path), record.name]
    with subprocess.Popen(command, env=environment) as driver:
        try:
            wait_until(
                lambda: any(trial.source and trial.state is TrialState.RUNNING for trial in record.trials()),
                lambda: f"a member to be replaced: {record.trials()}",
            )
        finally:
            driver.kill()
    left = record.trials()
    runs = {trial.run for trial in left}
    # One that was replaced by a trial which the driver had no time to book is gone on with, not finished.
    before = [
        trial
        for trial in left
        if trial.state.is_final and (not trial.replaced_by or trial.replaced_by in runs)
    ]
    sweep = start_population(cluster, str(tmp_path), name=record.name)
    sweep.wait(progress=False, timeout_s=200)
    trials = {trial.number: trial for trial in sweep.trials}
    assert before  # whoever was replaced
    assert [trials[trial.number] for trial in before] == before
    assert all(RunRecord(Storage(cluster.storage), trial.run).attempt == 1 for trial in before)
    assert all(trial.state.is_final for trial in trials.values())
    assert sum(trial.source is None for trial in trials.values()) == 4
    assert sum(trial.state is TrialState.FINISHED for trial in trials.values()) == 4


@pytest.mark.cluster
@pytest.mark.usefixtures("by_value")
def test_a_member_that_finds_no_room_yet_holds_up_nobody(cluster: ClusterInfo) -> None:
    other = start_sweep(
        cluster,
        Line(),
        SPACE,
        SweepOptions(trials=1, concurrent=1, name="holds-a-cpu", scheduler="none", steps=10_000_000),
    )
    wait_until(
        lambda: any(trial.step > 0 for trial in other.trials),
        lambda: f"the other sweep to begin: {other.trials}",
    )
    try:
        crowded = start_sweep(
            cluster,
            Line(),
            SPACE,
            SweepOptions(trials=4, concurrent=4, name="crowded", scheduler="pbt", steps=60),
        )
        crowded.wait(progress=False, timeout_s=120)
    finally:
        other.stop()
        other.wait(progress=False, timeout_s=60)
    assert all(trial.state.is_final for trial in crowded.trials)
    assert sum(trial.source is None for trial in crowded.trials) == 4
    assert sum(trial.state is TrialState.FINISHED for trial in crowded.trials) == 4


@pytest.mark.cluster
@pytest.mark.usefixtures("by_value")
def test_what_can_be_no_population_is_refused_before_anything_is_written(cluster: ClusterInfo) -> None:
    def start(space: Any = SPACE, **changes: Any) -> Any:
        asked: dict[str, Any] = {"trials": 8, "concurrent": 8, "name": "none-such", "scheduler": "pbt"}
        return start_sweep(cluster, Member(), space, SweepOptions(**{**asked, **changes}))

    with pytest.raises(RequestError, match=r"trials=8, but only 4 at a time"):
        start()
    with pytest.raises(RequestError, match=r"trials=3: a population has at least 4"):
        start(trials=3)
    with pytest.raises(RequestError, match=r"perturb_every=10: only scheduler='pbt' perturbs"):
        start(scheduler="asha", perturb_every=10)
    with pytest.raises(RequestError, match=r"depth: depth=1 and depth=3 build models of different shape"):
        start(trials=4, space={**SPACE, "depth": randint(1, 3)})
    assert not SweepRecord(Storage(cluster.storage), "none-such").dir.exists()
