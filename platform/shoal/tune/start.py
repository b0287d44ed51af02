"""Start a sweep, or go on with one: what was asked is filled in, refused or claimed, then driven by a thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from shoal.errors import DeadlineExceeded, RequestError
from shoal.recipe import Recipe
from shoal.storage import Storage
from shoal.train.option_rules import refuse
from shoal.train.options import plan_run, worker_resources
from shoal.train.spec import default_name
from shoal.tune.options import SweepOptions
from shoal.tune.population import check_population, default_interval
from shoal.tune.record import MAX_TRIALS, SweepRecord
from shoal.tune.shapes import changes_shape
from shoal.tune.space import Space, check_space, describe_space, num_combinations
from shoal.tune.sweep import Sweep, SweepDriver

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo
    from shoal.config import ClusterConfig
    from shoal.train.spec import RunSpec
    from shoal.tune.trial import TrialPlan
    from shoal.tune.trials import Trials

T = TypeVar("T")


def start_sweep(
    info: ClusterInfo, recipe: Recipe, space: Space, options: SweepOptions | None = None
) -> Sweep:
    """Search ``space`` for the recipe's best fields; returns at once.

    The recipe's own fields are what the space does not name. The same call goes on with a sweep that was stopped
    or killed, and returns one that is done.

    Raises:
        RequestError: a search that is impossible as asked, or that is being run already; nothing was started.
        IdentityError: the name belongs to another search.
        ClusterError: the cluster does not answer.
        StorageError: storage is full or not writable.
    """
    search = _fill_in(info, recipe, space, options or SweepOptions())
    search.plan.template.storage.check()
    record = SweepRecord(search.plan.template.storage, search.plan.sweep)
    room = _room(info, search.plan)
    _check_population(search, room)
    is_new = record.claim(search.identity)
    _take_lock(record)
    try:
        record.clear_stop()
        trials = _trials(record, search)
        run = _runner(trials, search, room) if trials.num_left else lambda: None
        driver = SweepDriver(trials, run, record.lock.release)
    except BaseException:
        record.lock.release()
        raise
    return Sweep(record, driver=driver, note=_note(search, room, trials, is_new=is_new))


@dataclass(frozen=True, kw_only=True)
class _SweepPlan:
    """A search with nothing left open: as asked, else as the file says."""

    options: SweepOptions
    space: Space
    identity: dict[str, Any]
    plan: TrialPlan
    trials: int
    """As many as were asked for; the space may have fewer combinations."""
    concurrent: int

    @property
    def is_population(self) -> bool:
        return self.options.scheduler == "pbt"

    @property
    def num_trials(self) -> int:
        return int(min(self.trials, num_combinations(self.space)))


class _Room(NamedTuple):
    """How many trials the cluster has room for at a time."""

    most: int
    """When nobody else holds anything."""
    now: int


def _fill_in(info: ClusterInfo, recipe: Recipe, space: Space, options: SweepOptions) -> _SweepPlan:
    from shoal.config import ClusterConfig
    from shoal.tune.trial import TrialPlan

    config = ClusterConfig.from_dict(info.config)
    trials = _given(options.trials, config.tune.trials)
    gpus = _given(options.gpus_per_worker, worker_resources(config, info).get("GPU", 0.0))
    options = replace(options, trials=trials, gpus_per_worker=gpus)  # checks what the file says, too
    space = check_space(recipe, space)
    template = _template(info, config, recipe, options)
    identity = _identity(template, space, options)
    name = default_name(identity, "sweep-") if options.name is None else options.name
    return _SweepPlan(
        options=options,
        space=space,
        identity=identity,
        plan=TrialPlan(
            sweep=name,
            template=replace(template, name=name),
            workers=options.workers,
            resources_per_worker={"CPU": options.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
            retries=_given(options.retries, config.train.retries),
        ),
        trials=trials,
        concurrent=_given(options.concurrent, config.tune.concurrent),
    )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _template(info: ClusterInfo, config: ClusterConfig, recipe: Recipe, options: SweepOptions) -> RunSpec:
    """A trial's run, but for its name and the fields that are searched."""
    template = plan_run(recipe, options.of_a_trial(), config, Storage(info.storage), project=info.project)
    template = replace(template, threads=max(1, int(options.cpus_per_worker)))
    if options.scheduler != "pbt":
        return template
    # What is copied from a trial must be there when it is measured, and stay while it is copied.
    return replace(template, checkpoint_at_eval=True, keep=2)


def _identity(template: RunSpec, space: Space, options: SweepOptions) -> dict[str, Any]:
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
        **({"scheduler": "pbt"} if options.scheduler == "pbt" else {}),
    }


def _room(info: ClusterInfo, plan: TrialPlan) -> _Room:
    """Raises RequestError when there is not even room for one, ever."""
    from shoal.capacity import ceiling, grant, snapshot
    from shoal.cluster.attach import attach
    from shoal.config import Range

    attach(info)
    seen = snapshot()
    most = MAX_TRIALS * plan.workers
    free = grant(seen, Range(plan.workers, most), plan.resources_per_worker)
    fit = int(min(ceiling(seen, plan.resources_per_worker), most))
    return _Room(most=fit // plan.workers, now=free // plan.workers)


def _check_population(search: _SweepPlan, room: _Room) -> None:
    if not search.is_population:
        return
    template = search.plan.template
    problems = check_population(
        trials=search.num_trials,
        side_by_side=min(room.most, search.concurrent),
        steps=template.target_steps,
        eval_every=template.recipe.eval_every,
        perturb_every=search.options.perturb_every,
    )
    shapes = (changes_shape(template.recipe, name, domain) for name, domain in search.space.items())
    refuse([*problems, *filter(None, shapes)])


def _take_lock(record: SweepRecord) -> None:
    try:
        record.lock.acquire()
    except DeadlineExceeded as err:
        raise RequestError(
            f"sweep {record.name!r} is being run already ({err}); stop it with `shoal stop {record.name}`, "
            "or choose another name"
        ) from None


def _trials(record: SweepRecord, search: _SweepPlan) -> Trials:
    from shoal.tune.search import Search
    from shoal.tune.trials import Trials

    sampler = Search(search.space, search.plan.template.recipe.objective, seed=search.options.seed)
    return Trials(record, search.plan, sampler, num_trials=search.num_trials)


def _runner(trials: Trials, search: _SweepPlan, room: _Room) -> Callable[[], None]:
    def run() -> None:
        from shoal.tune import ray_edge

        plan, options = search.plan, search.options
        recipe, steps = plan.template.recipe, plan.template.target_steps
        if search.is_population:
            interval = options.perturb_every or default_interval(steps, recipe.eval_every)
            decides = ray_edge.make_population(trials, recipe.objective, interval=interval)
        else:
            decides = ray_edge.make_scheduler(
                options.scheduler,
                recipe.objective,
                steps=steps,
                eval_every=recipe.eval_every,
                past=trials.evaluations(),
            )
        ray_edge.run_trials(
            trials,
            plan,
            scheduler=decides,
            concurrent=min(room.most, search.concurrent),
            folder=plan.template.storage.sweep_dir(plan.sweep) / "ray",
        )

    return run


def _note(search: _SweepPlan, room: _Room, trials: Trials, *, is_new: bool) -> str:
    asked, at_a_time = search.trials, search.concurrent
    notes = []
    if not is_new:
        done = sum(trial.state.is_final for trial in trials.snapshot())
        notes.append(f"goes on with a sweep that has {done} of {trials.num_trials} trials done")
    if trials.num_trials < asked:
        notes.append(f"{trials.num_trials} trials instead of {asked}: the space has no more combinations")
    if room.most < at_a_time:
        notes.append(f"at most {room.most} at a time instead of {at_a_time}: more do not fit on the cluster")
    if room.now < min(room.most, at_a_time, trials.num_left):
        notes.append(f"{room.now} at a time for now: others hold the rest (`shoal status` says who)")
        if search.is_population:
            notes.append("a trial that starts when others have ended is compared with none")
    return "; ".join(notes)
