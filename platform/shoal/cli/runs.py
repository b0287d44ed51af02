"""``shoal runs``: every run on storage, or one of them closely. Needs no cluster."""

from __future__ import annotations

import time
from collections.abc import Container
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.command import WORK, command
from shoal.cli.console import age_text, say, show_facts, show_table, values_text
from shoal.cli.project import storage
from shoal.errors import CorruptError, NotFoundError, RequestError, StorageError

if TYPE_CHECKING:
    from shoal.storage import Storage
    from shoal.tracking import RunRecord
    from shoal.train.run import Run

NUM_EVENTS = 12
"""Lines of a run's journal that are shown."""
MAX_MOMENTS = 60
"""Rows of a timeline that are shown, the newest."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        panel=WORK,
        examples=("shoal runs", "shoal runs digits-1a2b3c4d", "shoal runs show digits-1a2b3c4d"),
    )(runs)


def runs(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[show] NAME", help="Look at this run closely; show: at all that happened."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With show: as one JSON object.")] = False,
) -> None:
    """List the runs, the newest first; or look at one: its identity, how far it is and what happened last.

    With show: every start, death, hang, recovery, resize, checkpoint and end with its duration, and the goodput.
    """
    from shoal.tracking import list_runs
    from shoal.train.run import find_run
    from shoal.tune.record import pruned_runs

    place = storage()
    name, is_show = _asked(words or [], as_json)
    if name is not None and is_show:
        _show_timeline(find_run(place, name), as_json)
        return
    if name is not None:
        _show_run(find_run(place, name).record, pruned_runs(place))
        return
    records = list_runs(place)
    if not records:
        say("no runs yet; start one: shoal train MODULE")
        return
    show_runs(records, place)


def _asked(words: list[str], as_json: bool) -> tuple[str | None, bool]:
    """The run that is meant, if one is, and whether its timeline is."""
    is_show = len(words) == 2 and words[0] == "show"
    if len(words) > 1 and not is_show:
        raise RequestError(
            f"shoal runs {' '.join(words)}: it takes nothing, NAME, or show NAME; the names: shoal runs"
        )
    if as_json and not is_show:
        raise RequestError("--json is for one run's timeline: shoal runs show NAME --json")
    return (words[-1] if words else None), is_show


def _show_timeline(run: Run, as_json: bool) -> None:
    import json

    from shoal.train.timeline import (
        Row,
        goodput_text,
        rows_of,
        seconds_by_doing_text,
        troubles_text,
    )
    from shoal.train.timeline import as_json as whole

    timeline = run.timeline()
    if as_json:
        say(json.dumps(whole(timeline), indent=2))
        return
    facts = {
        "run": f"{run.name}, {run.state}",
        "goodput": goodput_text(timeline).removeprefix("goodput "),
        "time": seconds_by_doing_text(timeline),
        "trouble": troubles_text(timeline),
    }
    show_facts({name: value for name, value in facts.items() if value})
    rows = rows_of(timeline)
    left_out = max(0, len(rows) - MAX_MOMENTS)
    say(f"\n{left_out:,} earlier ones: shoal runs show {run.name} --json" if left_out else "")
    show_table(Row._fields, rows[left_out:], numbers=("took", "step", "workers", "lost"))


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
        case "driver":
            detail = f"{event['workers']} workers wanted, by pid {event['pid']}"
        case "grant":
            detail = f"room for {event['workers']} workers after {event['seconds']:.2f} s"
        case "lost":
            detail = f"rank {' and '.join(map(str, event['ranks']))}" if event["ranks"] else event["why"]
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
