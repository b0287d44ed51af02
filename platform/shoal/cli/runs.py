"""``shoal runs``: every run on storage, or one of them closely. Needs no cluster."""

from __future__ import annotations

import time
from collections.abc import Container
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.command import WORK, command
from shoal.cli.console import age_text, say, show_facts, show_table, values_text
from shoal.cli.project import storage
from shoal.errors import CorruptError, NotFoundError, StorageError

if TYPE_CHECKING:
    from shoal.storage import Storage
    from shoal.tracking import RunRecord
    from shoal.train.run import Run

NUM_EVENTS = 12
"""Lines of a run's journal that are shown."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, panel=WORK, examples=("shoal runs", "shoal runs digits-1a2b3c4d"))(runs)


def runs(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this run closely.")] = None,
) -> None:
    """List the runs, the newest first; or show one: its identity, how far it is and what happened last."""
    from shoal.tracking import list_runs
    from shoal.train.run import find_run
    from shoal.tune.record import pruned_runs

    place = storage()
    if name is not None:
        _show_run(find_run(place, name).record, pruned_runs(place))
        return
    records = list_runs(place)
    if not records:
        say("no runs yet; start one: shoal train MODULE")
        return
    show_runs(records, place)


def show_runs(records: list[RunRecord], place: Storage) -> None:
    """A table of runs, which are on ``place``."""
    from shoal.tune.record import pruned_runs

    columns = ("run", "state", "step", "of", "best", "workers", "age")
    pruned = pruned_runs(place)
    show_table(
        columns, (_row(record, pruned) for record in records), numbers=("step", "of", "workers", "age")
    )


def _row(record: RunRecord, pruned: Container[str]) -> tuple[Any, ...]:
    try:
        return _facts_of(record, pruned)
    except (CorruptError, StorageError, OSError):  # `shoal runs NAME` says what is wrong with it
        return (record.name, "damaged", "", "", "", "", "")


def _facts_of(record: RunRecord, pruned: Container[str]) -> tuple[Any, ...]:
    from shoal.train.run import objective_of
    from shoal.tune.record import state_word

    objective, best = objective_of(record), None
    if objective is not None:
        best = record.best(objective)
    starts = record.events(("start",))
    target = record.target_steps
    return (
        record.name,
        state_word(record, pruned),
        f"{record.step:,}",
        f"{target:,}" if target else "",
        f"{objective.metric} {best['values'][objective.metric]:.4g}" if objective and best else "",
        starts[-1]["workers"] if starts else "",
        age_text(starts[0]["t"]) if starts else "",
    )


def _show_run(record: RunRecord, pruned: Container[str]) -> None:
    from shoal.train.run import best_text
    from shoal.tune.record import state_word

    identity = record.identity() or {}
    starts = record.events(("start",))
    checkpoints = [e for e in record.events(("checkpoint",)) if (record.dir / e["path"]).is_dir()]
    facts = {
        "run": record.name,
        "state": state_word(record, pruned),
        "steps": _steps_text(record),
        "attempts": record.attempt,
        "workers": _workers_text(record) if starts else "",
        "started": f"{age_text(starts[0]['t'])} ago" if starts else "",
        "recipe": identity.get("recipe", ""),
        "fields": " ".join(f"{key}={value}" for key, value in identity.get("fields", {}).items()),
        "seed": identity.get("seed", ""),
        "from": identity.get("init_from") or _source_text(identity.get("source")),
        "val": values_text(record.last_eval("val")),
        "test": values_text(record.last_eval("test")),
        "best": best_text(record),
        "checkpoints": ", ".join(f"{event['step']:,}" for event in checkpoints),
        "folder": record.dir,
    }
    show_facts({key: value for key, value in facts.items() if value != ""})
    say()
    for event in record.events()[-NUM_EVENTS:]:
        say(_event_text(event))


def show_result(run: Run) -> None:
    """Where the run stands, and what to do next."""
    from shoal.train.run import best_text

    record = run.record
    facts = {
        "run": run.name,
        "state": str(run.state),
        "steps": _steps_text(record),
        "val": values_text(record.last_eval("val")),
        "test": values_text(record.last_eval("test")),
        "best": best_text(record),
        "checkpoint": _checkpoint_text(run),
        "next": _next_text(run),
    }
    show_facts({name: text for name, text in facts.items() if text})


def _steps_text(record: RunRecord) -> str:
    target = record.target_steps
    return f"{record.step:,} of {target:,}" if target else f"{record.step:,}"


def _checkpoint_text(run: Run) -> str:
    try:
        return str(run.best_checkpoint())
    except NotFoundError:
        return ""


def _next_text(run: Run) -> str:
    from shoal.train.run import where_it_goes_on

    if str(run.state) != "finished":
        return where_it_goes_on(run.record)
    identity = run.record.identity() or {}
    model = model_name(str(identity.get("recipe", ""))) or "NAME"
    return f"shoal register {model} {run.name} --alias champion"


def model_name(recipe: str) -> str:
    """What a model of the recipe ``jobs.my_task:MyTask`` is called by itself: ``my_task``, as `shoal init` writes it.

    The class's name in small letters where the module is not called like it.
    """
    module, _, class_name = recipe.rpartition(":")
    name = class_name.lower()
    last = module.rpartition(".")[2]
    return last if last.replace("_", "") == name else name


def _workers_text(record: RunRecord) -> str:
    """How many there are, and how many are wished where that is another number."""
    from shoal.tracking import RunState

    current = record.summary().workers
    wish = record.resizing.wish() if record.state() is RunState.RUNNING else None
    if wish is None or current in wish.workers:
        return str(current)
    return f"{current}; {wish.workers} from the next step boundary at which there is room"


def _source_text(source: dict[str, Any] | None) -> str:
    """The other run's checkpoint that a run of a population went on from."""
    return f"{source['run']} at step {source['step']:,}" if source else ""


def _event_text(event: dict[str, Any]) -> str:
    from shoal.storage.disk import size_text

    kind = event["kind"]
    when = time.strftime("%H:%M:%S", time.localtime(event["t"]))
    step = f"step {event['step']:,}" if "step" in event else ""
    match kind:
        case "start":
            detail = f"{event['workers']} workers, {event['source']}"
        case "resize":
            detail = f"from {event['from']} to {event['to']} workers"
        case "metrics":
            detail = values_text(event["values"])
        case "eval":
            detail = f"{event['split']} {values_text(event['values'])}"
        case "checkpoint":
            detail = f"{size_text(event['size_bytes'])} in {event['seconds']:.2f} s"
        case "end":
            detail = f"{event['state']} {event['error']}".strip()
        case "rejected":
            detail = f"{event['path']}: {event['reason']}"
        case _:
            detail = str(event.get("message", ""))
    return f"{when}  {kind:<10}  {step:<12}  {detail}".rstrip()
