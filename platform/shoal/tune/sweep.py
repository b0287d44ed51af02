"""A sweep: a search over a recipe's fields, driven by a thread of the process that started it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from shoal.errors import (
    ClusterError,
    DeadlineExceeded,
    NotFoundError,
    RecipeError,
    RequestError,
    ShoalError,
)
from shoal.recipe import Objective, Recipe
from shoal.storage import Storage
from shoal.train.revision import code_revision
from shoal.tune.population import check_population, default_interval
from shoal.tune.record import MAX_TRIALS, SweepRecord, Trial, TrialState, sweep_name_of
from shoal.tune.shapes import changes_shape
from shoal.tune.show import reporter, sweep_frame, sweep_html
from shoal.tune.space import Space, check_space, describe_space, num_combinations

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from shoal.capacity import Resources
    from shoal.cluster import ClusterInfo
    from shoal.train.spec import RunSpec
    from shoal.tune.trial import TrialPlan
    from shoal.tune.trials import Trials

logger = logging.getLogger(__name__)

SchedulerKind = Literal["asha", "pbt", "none"]
_SCHEDULERS: tuple[SchedulerKind, ...] = ("asha", "pbt", "none")
_LOOK_S = 0.5


class Sweep:
    """A search over a recipe's fields: its trials, the best of them, how it goes.

    Comes from `start_sweep`, which drives it, or `open_sweep`, which only reads its record.
    """

    def __init__(self, record: SweepRecord, *, driver: _Driver | None = None, note: str = "") -> None:
        self._record = record
        self._driver = driver
        self._identity = record.identity()
        self.note = note
        """Anything the user should know about how the sweep was started; empty if nothing."""

    @property
    def name(self) -> str:
        """The sweep's name; its runs are called ``<name>-t001`` and so on."""
        return self._record.name

    @property
    def objective(self) -> Objective:
        """What "best" means."""
        return Objective(**self._identity["objective"])

    @property
    def trials(self) -> list[Trial]:
        """Every trial so far, as it stands, by number."""
        return self._driver.trials.snapshot() if self._driver is not None else self._record.trials()

    @property
    def is_active(self) -> bool:
        """True while somebody works on the sweep, in this process or in another."""
        return (self._driver is not None and self._driver.is_alive()) or self._record.lock.is_held()

    @property
    def best(self) -> Trial:
        """The trial with the best objective on validation data, of those that finished or were pruned.

        While none has, of all that measured it. ``best.run`` is its run's name.

        Raises:
            NotFoundError: no trial has measured the objective yet.
        """
        return best_of(self.name, self.trials, self.objective)

    def frame(self) -> pd.DataFrame:
        """One row per trial: run, state, step, searched fields, validation metrics (``val_...``)."""
        return sweep_frame(self.trials, self.objective)

    def plot(self) -> Figure:
        """The objective by trial, and against each field that was searched."""
        from shoal.tune.plots import plot_sweep

        return plot_sweep(self.name, self.trials, self.objective, self._identity["space"])

    def stop(self) -> None:
        """Start no more trials, and let those that run commit and stop. Does not block; safe to repeat.

        Wherever the sweep is driven. The same command goes on with it.
        """
        if self._driver is not None and self._driver.is_alive():
            self._driver.trials.stop()
        else:
            self._record.mark_stop()

    def wait(self, *, timeout_s: float | None = None, progress: bool = True) -> Sweep:
        """Block until every trial is done, showing a table of them; returns the sweep.

        Ctrl-C stops the sweep as `stop` does and waits for that; a second one leaves at once.

        Raises:
            RecipeError: trials failed and none did better; the first one's error.
            EnvironmentFailure: the cluster failed the sweep; the same command goes on with it.
            DeadlineExceeded: ``timeout_s`` seconds passed; the sweep goes on.
        """
        if self._driver is not None:
            with reporter(self, self._driver.trials.num_trials, enabled=progress) as report:
                try:
                    self._wait(self._driver, report.update, timeout_s)
                except KeyboardInterrupt:
                    report.say(
                        "stopping: running trials commit a checkpoint and stop (Ctrl-C again: at once)"
                    )
                    self.stop()
                    self._wait(self._driver, report.update, None)
                    raise
            if (failure := self._driver.failure) is not None:
                raise failure
        self._raise_if_all_failed()
        return self

    def _wait(self, driver: _Driver, show: Callable[[], None], timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        seen = driver.trials.snapshot()
        while driver.is_alive():
            show()
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"sweep {self.name!r} did not end within {timeout_s:g} s; it goes on ({self!r})"
                )
            seen = driver.wait_changed(seen, _LOOK_S)
        show()

    def _raise_if_all_failed(self) -> None:
        failed = [trial for trial in self.trials if trial.state is TrialState.FAILED]
        if failed and len(failed) == len(self.trials):
            raise RecipeError(
                f"sweep {self.name!r}: all {len(failed)} trials failed, so no more were started. "
                f"{failed[0].run}: {failed[0].error}\n  full text: shoal logs {failed[0].run}. "
                "Mend the recipe and give the sweep another name; failed trials are not repeated"
            )

    def __repr__(self) -> str:
        counts = {state: sum(trial.state is state for trial in self.trials) for state in TrialState}
        words = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no trial yet"
        return f"Sweep({self.name!r}, {words})"

    def _repr_html_(self) -> str:
        return sweep_html(self.name, self.trials, self.objective)


class _Driver:
    """The thread that runs the trials. A daemon: a sweep whose process ends is gone on with by the next."""

    def __init__(self, trials: Trials, run: Callable[[], None], close: Callable[[], None]) -> None:
        self.trials = trials
        self.failure: ShoalError | None = None
        self._run, self._close = run, close
        self._thread = threading.Thread(target=self._main, name="shoal-sweep", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wait_changed(self, seen: list[Trial], timeout_s: float) -> list[Trial]:
        return self.trials.wait_changed(seen, timeout_s) if self.is_alive() else seen

    def _main(self) -> None:
        try:
            self._run()
        except ShoalError as err:
            self.failure = err
        except Exception as err:  # a thread's exception would vanish: `wait` raises it
            logger.debug("the sweep's driver failed", exc_info=True)
            self.failure = ClusterError(f"the sweep's driver failed: {type(err).__name__}: {err}")
        finally:
            self.trials.close()
            self._close()


def best_of(sweep: str, trials: list[Trial], objective: Objective) -> Trial:
    """The best trial, preferring those that are done.

    Raises:
        NotFoundError: none has measured the objective.
    """
    measured = [trial for trial in trials if trial.value is not None and trial.state is not TrialState.FAILED]
    measured = [trial for trial in measured if trial.state.is_final] or measured
    best: Trial | None = None
    for trial in measured:
        if trial.value is not None and objective.is_better(trial.value, best.value if best else None):
            best = trial
    if best is None:
        raise NotFoundError(
            f"no trial of sweep {sweep!r} has measured its objective ({objective}) yet; wait for it, "
            f"or see why: {next((trial.error for trial in trials if trial.error), 'no trial failed')}"
        )
    return best


def open_sweep(storage: Storage, name: str) -> Sweep:
    """A sweep by name, for reading: its record needs no cluster.

    Raises:
        NotFoundError: there is no such sweep; the message lists those that exist.
    """
    return Sweep(SweepRecord(storage, name))


def start_sweep(
    info: ClusterInfo,
    recipe: Recipe,
    space: Space,
    *,
    trials: int,
    concurrent: int,
    name: str | None = None,
    seed: int = 0,
    scheduler: SchedulerKind = "asha",
    perturb_every: int | None = None,
    steps: int | None = None,
    workers: int = 1,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    precision: Literal["fp32", "bf16"] = "fp32",
    checkpoint_every_s: float = 30.0,
    retries: int = 3,
) -> Sweep:
    """Search ``space`` for the recipe's best fields, with ``trials`` runs; returns at once.

    The recipe's own fields are what the space does not name. Optuna's TPE chooses; with ``scheduler="asha"``
    trials that are worse than others at the same step end early; with ``"pbt"`` ``trials`` is a population that
    trains side by side, in which a trial among the worst is replaced by a copy of one among the best with fields
    changed a little, a new run that goes on from the other's checkpoint. At most ``concurrent`` run at a time,
    fewer where fewer fit. The same call goes on with a sweep that was stopped or killed, and returns one that
    is done; ``trials`` may grow.

    Args:
        name: default ``<recipe>-sweep-<8 hex>``, of everything that makes it this search.
        seed: of the search and of every trial's run.
        perturb_every: with ``"pbt"``, steps between two comparisons of a trial, taken at the next evaluation;
            None for the evaluation nearest to a fifth of the steps.
        steps: of each trial; None for the recipe's own.
        workers: of each trial; it starts when there is room for all of them, and holds that until it ends.
        cpus_per_worker, gpus_per_worker: what each of them holds; its torch threads are its whole CPUs.
        retries: how often a trial whose process dies is started again; with several workers, how often these
            are when one dies.

    Raises:
        RequestError: a search that is impossible as asked, or that is being run already; nothing was started.
        IdentityError: the name belongs to another search.
        ClusterError: the cluster does not answer.
    """
    resources = (
        {"CPU": cpus_per_worker, "GPU": gpus_per_worker} if gpus_per_worker else {"CPU": cpus_per_worker}
    )
    _check_numbers(
        trials=trials,
        concurrent=concurrent,
        steps=steps,
        workers=workers,
        resources_per_worker=resources,
        scheduler=scheduler,
        perturb_every=perturb_every,
    )
    space = check_space(recipe, space)
    storage = Storage(info.storage)
    storage.check()
    possible = int(min(trials, num_combinations(space)))
    revision = code_revision(info.project)
    template = _template(
        recipe, storage, revision, steps, seed, precision, checkpoint_every_s, int(cpus_per_worker)
    )
    if scheduler == "pbt":
        # What is copied from a trial must be there when it is measured, and stay while it is copied.
        template = replace(template, checkpoint_at_eval=True, keep=2)
    identity = _identity(template, space, scheduler)
    record = SweepRecord(storage, name or sweep_name_of(identity))
    fit, free = _room(info, workers, resources)
    if scheduler == "pbt":
        _check_population(template, space, possible, min(fit, concurrent), perturb_every)
    is_new = record.claim(identity)
    _take_lock(record)
    try:
        record.clear_stop()
        plan = _plan(record, template, workers, resources, retries)
        ledger = _ledger(record, plan, space, possible, seed)
        run = _runner(ledger, plan, scheduler, concurrent=min(fit, concurrent), perturb_every=perturb_every)
        driver = _Driver(ledger, run if ledger.num_left else lambda: None, record.lock.release)
    except BaseException:
        record.lock.release()
        raise
    return Sweep(record, driver=driver, note=_note(ledger, trials, is_new, fit, free, concurrent, scheduler))


def _check_numbers(
    *,
    trials: int,
    concurrent: int,
    steps: int | None,
    workers: int,
    resources_per_worker: dict[str, float],
    scheduler: str,
    perturb_every: int | None,
) -> None:
    problems = []
    if not 1 <= trials <= MAX_TRIALS:
        problems.append(f"trials={trials}: a sweep has 1 to {MAX_TRIALS}")
    if concurrent < 1:
        problems.append(f"concurrent={concurrent}: at least 1 trial must run at a time")
    if steps is not None and steps < 1:
        problems.append(f"steps={steps}: a trial has at least 1 step")
    if workers < 1:
        problems.append(f"workers={workers}: a trial has at least 1 worker")
    amounts = resources_per_worker.values()
    if not (all(0 <= amount < math.inf for amount in amounts) and any(amounts)):
        asked = ", ".join(f"{name.lower()}s_per_worker={n:g}" for name, n in resources_per_worker.items())
        problems.append(f"{asked}: a worker holds a CPU or a GPU, or part of one")
    if scheduler not in _SCHEDULERS:
        problems.append(f"scheduler={scheduler!r}: one of {', '.join(_SCHEDULERS)}")
    if perturb_every is not None and scheduler != "pbt":
        problems.append(f"perturb_every={perturb_every}: only scheduler='pbt' perturbs; leave it out")
    if scheduler == "pbt" and workers > 1:
        problems.append(
            f"workers={workers}: the trials of a population have one worker each; leave workers out, or take "
            "another scheduler"
        )
    _refuse(problems)


def _check_population(
    template: RunSpec, space: Space, trials: int, side_by_side: int, perturb_every: int | None
) -> None:
    problems = check_population(
        trials=trials,
        side_by_side=side_by_side,
        steps=template.target_steps,
        eval_every=template.recipe.eval_every,
        perturb_every=perturb_every,
    )
    for name, domain in space.items():
        if problem := changes_shape(template.recipe, name, domain):
            problems.append(problem)
    _refuse(problems)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise RequestError(
            "\n".join(["the sweep cannot be started as asked:", *(f"  {p}" for p in problems)])
        )


def _template(
    recipe: Recipe,
    storage: Storage,
    revision: str,
    steps: int | None,
    seed: int,
    precision: Literal["fp32", "bf16"],
    checkpoint_every_s: float,
    threads: int,
) -> RunSpec:
    from shoal.train.spec import RunSpec

    return RunSpec(
        recipe=recipe,
        name="template",
        storage=storage,
        target_steps=steps if steps is not None else type(recipe).steps,
        seed=seed,
        precision=precision,
        checkpoint_every_s=checkpoint_every_s,
        keep=1,
        revision=revision,
        threads=max(1, threads),
    )


def _identity(template: RunSpec, space: Space, scheduler: SchedulerKind) -> dict[str, Any]:
    """What makes it this search: a run's identity, with the space in place of the searched fields' values.

    Also that it is a population, whose later trials begin where others were; any other scheduler may take turns.
    """
    identity = template.identity()
    fixed = {name: value for name, value in identity["fields"].items() if name not in space}
    objective = template.recipe.objective
    return {
        **identity,
        "fields": fixed,
        "space": describe_space(space),
        "steps": template.target_steps,
        "objective": {"metric": objective.metric, "mode": objective.mode},
        **({"scheduler": scheduler} if scheduler == "pbt" else {}),
    }


def _room(info: ClusterInfo, workers: int, resources_per_worker: Resources) -> tuple[int, int]:
    """How many trials the cluster has room for at a time: when nobody else holds anything, and now.

    Raises:
        RequestError: not even one, ever.
    """
    from shoal.capacity import ceiling, grant, snapshot
    from shoal.cluster.attach import attach
    from shoal.config.values import Range

    attach(info)
    seen = snapshot()
    most = MAX_TRIALS * workers
    free = grant(seen, Range(workers, most), resources_per_worker)
    return int(min(ceiling(seen, resources_per_worker), most) // workers), free // workers


def _take_lock(record: SweepRecord) -> None:
    try:
        record.lock.acquire()
    except DeadlineExceeded as err:
        raise RequestError(
            f"sweep {record.name!r} is being run already ({err}); stop it with `shoal stop {record.name}`, "
            "or choose another name"
        ) from None


def _plan(
    record: SweepRecord, template: RunSpec, workers: int, resources_per_worker: Resources, retries: int
) -> TrialPlan:
    from shoal.tune.trial import TrialPlan

    return TrialPlan(
        sweep=record.name,
        template=replace(template, name=record.name),
        workers=workers,
        resources_per_worker=resources_per_worker,
        retries=retries,
    )


def _ledger(record: SweepRecord, plan: TrialPlan, space: Space, num_trials: int, seed: int) -> Trials:
    from shoal.tune.search import Search
    from shoal.tune.trials import Trials

    search = Search(space, plan.template.recipe.objective, seed=seed)
    return Trials(record, plan, search, num_trials=num_trials)


def _runner(
    ledger: Trials,
    plan: TrialPlan,
    scheduler: SchedulerKind,
    *,
    concurrent: int,
    perturb_every: int | None,
) -> Callable[[], None]:
    def run() -> None:
        from shoal.tune import ray_edge

        recipe, steps = plan.template.recipe, plan.template.target_steps
        if scheduler == "pbt":
            interval = perturb_every or default_interval(steps, recipe.eval_every)
            decides = ray_edge.make_population(ledger, recipe.objective, interval=interval)
        else:
            decides = ray_edge.make_scheduler(
                scheduler,
                recipe.objective,
                steps=steps,
                eval_every=recipe.eval_every,
                past=ledger.evaluations(),
            )
        ray_edge.run_trials(
            ledger,
            plan,
            scheduler=decides,
            concurrent=concurrent,
            folder=plan.template.storage.sweep_dir(plan.sweep) / "ray",
        )

    return run


def _note(
    ledger: Trials,
    trials: int,
    is_new: bool,
    fit: int,
    free: int,
    concurrent: int,
    scheduler: SchedulerKind,
) -> str:
    notes = []
    if not is_new:
        done = sum(trial.state.is_final for trial in ledger.snapshot())
        notes.append(f"goes on with a sweep that has {done} of {ledger.num_trials} trials done")
    if ledger.num_trials < trials:
        notes.append(f"{ledger.num_trials} trials instead of {trials}: the space has no more combinations")
    if fit < concurrent:
        notes.append(f"at most {fit} at a time instead of {concurrent}: more do not fit on the cluster")
    if free < min(fit, concurrent, ledger.num_left):
        notes.append(f"{free} at a time for now: others hold the rest (`shoal status` says who)")
        if scheduler == "pbt":
            notes.append("a trial that starts when others have ended is compared with none")
    return "; ".join(notes)
