"""The one place that speaks to Ray Tune: run trials side by side, let a scheduler end the worse ones early.

Tune gives every trial's process a runtime environment (one variable that only PyTorch Lightning reads), so
Ray starts a fresh process for it, which imports torch again: 2 to 4 s per trial. Ours carry none and are copies
of the cluster's template (`shoal.cluster.template`). Tune's own results, logs and pickled state go to a folder
that is deleted at the end; what a trial has to say is in its run's record.

``tests/tune/test_tune_ray_edge.py`` fails, naming what to look at, when an upgrade moves a private name used here.
Imports ray at the top: it is only imported to run a sweep.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import ray
from ray import tune
from ray.tune.execution import class_cache, tune_controller
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper
from ray.util.placement_group import get_current_placement_group

from shoal.config import Range
from shoal.errors import ClusterError
from shoal.recipe import Objective
from shoal.tracking import RunRecord
from shoal.train.driver import WorkersDriver
from shoal.train.output import captured_output, log_path
from shoal.train.ray_edge import keep_raylet_quiet
from shoal.train.spec import EvalListener, RunSpec
from shoal.tune.ray_population import Population
from shoal.tune.record import MAX_TRIALS
from shoal.tune.trial import STOP_TIMEOUT_S, TrialPlan, TrialRun, train_here
from shoal.tune.trial_on_workers import TrialOnWorkers
from shoal.tune.trials import Trials

logger = logging.getLogger(__name__)

_METRIC = "objective"
"""The objective's name towards Tune; a recipe's metric may have a name that Tune uses itself."""
_HAS_ENDED = "has_ended"
"""Whether the trial ended by itself; Tune sets its own ``done`` also where a scheduler ended it."""
_REDUCTION = 3
"""ASHA lets the best third go on at each rung: Li et al., "A System for Massively Parallel Hyperparameter
Tuning" (2020), use 4; 3 prunes less of a small sweep."""


class TrialActor(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """One process that runs trials, one after the other."""

    plan: ClassVar[TrialPlan]
    """Set on the subclass that `run_trials` makes."""

    def setup(self, config: dict[str, Any]) -> None:
        # Tune moves the process into a folder of its own; a recipe's relative paths mean where it was before.
        os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", os.getcwd()))
        spec = self.plan.spec(config["trial"], config["fields"], config["source"])
        self._run = (
            TrialRun(spec, train=_train_logged)
            if self.plan.workers == 1
            else TrialOnWorkers(spec, _start_workers(spec, self.plan))
        )

    def step(self) -> dict[str, Any]:
        report = self._run.next()
        value = math.nan if report.value is None else report.value  # Tune insists on a number
        return {_METRIC: value, "step": report.step, "done": report.has_ended, _HAS_ENDED: report.has_ended}

    def cleanup(self) -> None:
        self._run.stop()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        if not self._run.stop():
            # Raised, because where this returns False Tune forgets the new trial: it would wait forever.
            raise ClusterError(
                f"the trial before did not come to a step boundary within {STOP_TIMEOUT_S:g} s"
            )
        self.setup(new_config)
        return True


def _train_logged(spec: RunSpec, on_eval: EvalListener) -> None:
    record = RunRecord(spec.storage, spec.name)
    with captured_output(log_path(record.logs_dir, 0)):
        train_here(spec, on_eval)


def _start_workers(spec: RunSpec, plan: TrialPlan) -> WorkersDriver:
    """Start the trial's workers in its own placement group: a second one, asked for while this one is held, is
    how trials that each have half of what they need come to wait for each other for ever."""
    driver = WorkersDriver(
        spec,
        RunRecord(spec.storage, spec.name),
        Range(plan.workers, plan.workers),
        plan.resources_per_worker,
        plan.retries,
        placement_group=get_current_placement_group(),
    )
    driver.start(heed_stop=True)
    return driver


class _Suggestions(Searcher):  # type: ignore[misc]
    """Tune's way to ask for the next trial."""

    def __init__(self, trials: Trials, *, may_come: Callable[[], bool]) -> None:
        super().__init__()
        self._trials = trials
        self._may_come = may_come

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        trial = self._trials.next()
        if trial is None:
            return None if self._may_come() else str(Searcher.FINISHED)
        return {
            "trial": trial.number,
            "fields": dict(trial.fields),
            "source": trial.source,
            "step": trial.step if trial.source is None else max(trial.step, trial.source.step),
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Booked by `_Watch`, which is told which trial it was."""

    def save(self, checkpoint_path: str) -> None:
        """What Tune would pickle is in the sweep's record."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: a sweep goes on from its record, not from Tune's pickles."""

    def __reduce__(self) -> Any:
        return Searcher, ()  # Tune pickles it with its own state, which nobody reads


class _Watch(tune.Callback):  # type: ignore[misc]
    """Books what becomes of trials."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._trials.started(trial.config["trial"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        value = result[_METRIC]
        self._trials.reported(trial.config["trial"], result["step"], None if math.isnan(value) else value)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # One that Tune ended may still be on its way to a step boundary: its journal does not say so yet.
        self._trials.ended(trial.config["trial"], was_pruned=not trial.last_result.get(_HAS_ENDED, True))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._trials.lost(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._trials.ended(trial.config["trial"], error=_last_error(trial))

    def __reduce__(self) -> Any:
        return tune.Callback, ()


class _StopWhenIdle(Stopper):  # type: ignore[misc]
    """Ends the experiment when the sweep is to stop and no trial has a process that could stop by itself."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._trials.is_stopping and not self._trials.has_running

    def __reduce__(self) -> Any:
        return tune.stopper.NoopStopper, ()


class _ActorClasses(class_cache._ActorClassCache):  # type: ignore[misc]
    """Tune's actor classes, ours without the runtime environment that would cost each a fresh process."""

    def get(self, trainable_cls: type) -> Any:
        if not issubclass(trainable_cls, TrialActor):
            return super().get(trainable_cls)
        if trainable_cls not in self._cache:
            self._cache[trainable_cls] = ray.remote(trainable_cls)
        return self._cache[trainable_cls]


def run_trials(
    trials: Trials,
    plan: TrialPlan,
    *,
    scheduler: TrialScheduler,
    concurrent: int,
    folder: Path,
) -> None:
    """Run every trial that ``trials`` hands out, ``concurrent`` at a time; blocks until all are done.

    A trial holds its workers' resources, all or none of them; one whose process dies is started again, on from
    its last checkpoint. ``folder`` is Tune's own, deleted before and after.

    Raises:
        ClusterError: Tune gave up.
    """
    _prepare()
    shutil.rmtree(folder, ignore_errors=True)
    actor = type("Trial", (TrialActor,), {"plan": plan})
    bundles = [dict(plan.resources_per_worker)] * plan.workers
    if plan.workers > 1:
        bundles = [{}, *bundles]  # the trial's process itself hardly computes
    population = scheduler if isinstance(scheduler, Population) else None
    try:
        tune.Tuner(
            tune.with_resources(actor, tune.PlacementGroupFactory(bundles)),
            tune_config=tune.TuneConfig(
                search_alg=_Suggestions(
                    trials, may_come=lambda: population is not None and population.has_live
                ),
                scheduler=scheduler,
                num_samples=trials.num_left if population is None else MAX_TRIALS,
                max_concurrent_trials=concurrent,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(folder.parent),
                callbacks=[_Watch(trials)],
                stop=_StopWhenIdle(trials),
                failure_config=tune.FailureConfig(max_failures=plan.retries),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the engine keeps its own
                verbose=0,
            ),
        ).fit()
    except (tune.TuneError, ray.exceptions.RayError, OSError) as err:
        raise ClusterError(
            f"Ray Tune gave up on sweep {plan.sweep!r}: {err}. Look at `shoal status`; "
            "the same command goes on with the trials that are not done"
        ) from err
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_population(trials: Trials, objective: Objective, *, interval: int) -> TrialScheduler:
    """Population-based training: who is replaced, and by a copy of whom, every ``interval`` steps of a trial."""
    return Population(trials, objective, metric=_METRIC, interval=interval)


def make_scheduler(
    kind: str, objective: Objective, *, steps: int, eval_every: int, past: list[tuple[int, int, float]]
) -> TrialScheduler:
    """Who decides which trials go on: ``asha`` or ``none``.

    ``past`` are evaluations of trials that are done, (trial, step, objective): the others are measured
    against them too. With ``asha``, trials first meet at the evaluation nearest to a ninth of the steps; runs
    with a single evaluation are never ended early.
    """
    if kind == "none" or steps <= eval_every:
        return FIFOScheduler()
    first_rung = max(eval_every, math.ceil(steps / _REDUCTION**2 / eval_every) * eval_every)
    scheduler = ASHAScheduler(
        time_attr="step",
        metric=_METRIC,
        mode=objective.mode,
        max_t=steps,
        grace_period=first_rung,
        reduction_factor=_REDUCTION,
    )
    for number in sorted({number for number, _, _ in past}):
        stand_in = SimpleNamespace(trial_id=f"past-{number}")
        scheduler.on_trial_add(None, stand_in)
        for trial, step, value in past:
            if trial == number:
                scheduler.on_trial_result(None, stand_in, {"step": step, _METRIC: value})
    return scheduler


def _prepare() -> None:
    """Settings that Tune takes from the process: no result files of its own, no tables, our actor classes."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    for name in ("ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a trial's error is in its run's record
    tune_controller._ActorClassCache = _ActorClasses  # other trainables get what they always got
    keep_raylet_quiet()


def _last_error(trial: Any) -> str:
    """The last line of what Tune wrote down about a trial's failure."""
    lines = [line.strip() for line in (trial.get_error() or "").splitlines() if line.strip()]
    return f"its process failed too often: {lines[-1] if lines else 'no reason known'}"
