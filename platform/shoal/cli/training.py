"""Train a recipe on the running cluster and wait for it, as ``shoal train`` and a job's ``train`` do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from shoal.cli.console import console, say, show_facts, values_text
from shoal.cli.interrupt import sigterm_interrupts
from shoal.errors import NotFoundError, RequestError

if TYPE_CHECKING:
    from shoal.recipe import Recipe
    from shoal.train.run import Run


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run is to be trained; None is the cluster file's or the recipe's.

    Raises:
        RequestError: text that is no range or duration, naming the option.
    """

    workers: str | None = None
    steps: int | None = None
    name: str | None = None
    seed: int = 0
    precision: str = "fp32"
    checkpoint_every: str | None = None
    keep: int | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        from shoal.config import Duration, Range

        for option, text, parse in (
            ("--workers", self.workers, Range.parse),
            ("--checkpoint-every", self.checkpoint_every, Duration.parse),
        ):
            try:
                if text is not None:
                    parse(text)
            except (RequestError, ValueError) as err:
                raise RequestError(f"{option} {text}: {err}") from None

    def as_words(self) -> list[str]:
        """As options of ``shoal train``."""
        default = TrainOptions()
        return [
            f"--{name.replace('_', '-')}={value}"
            for name, value in asdict(self).items()
            if value != getattr(default, name)
        ]

    def of_run(self) -> dict[str, Any]:
        """As arguments of `Cluster.plan`, which wants no workers."""
        return {name: value for name, value in asdict(self).items() if name != "workers"}


def start(
    recipe: Recipe, options: TrainOptions, *, words: Sequence[str], detach: bool, dry_run: bool
) -> None:
    """Train as the options say: here and now, on the cluster without us, or not at all.

    ``words`` are the recipe's fields as they were typed.

    Raises:
        RequestError, RecipeError, EnvironmentFailure: as `train_and_wait`.
    """
    if detach and dry_run:
        raise RequestError("--detach starts a run and --dry-run starts nothing: choose one")
    if dry_run:
        from shoal.cli.dry_run import dry_run as rehearse

        rehearse(recipe, options)
    elif detach:
        from shoal.cli.detached import train_detached

        train_detached(recipe, words, options)
    else:
        train_and_wait(recipe, options)


def train_and_wait(recipe: Recipe, options: TrainOptions) -> None:
    """Train on the running cluster, driven by this process; shows progress, then the result.

    Ctrl-C and SIGTERM commit a checkpoint and stop; the same command goes on from there.

    Raises:
        RequestError: no cluster runs, or the run cannot be as asked.
        RecipeError, EnvironmentFailure: as `Run.wait`.
    """
    from shoal.cli.place import connect

    cluster = connect()
    with sigterm_interrupts():  # after attaching: Ray installs a handler of its own
        run = cluster.train(recipe, workers=options.workers, **options.of_run())
        say(run.note or f"run {run.name}")
        try:
            run.wait()
        except KeyboardInterrupt:
            if not console().is_terminal:  # there the bar ended in a line that says as much
                show_result(run)
            raise
    show_result(run)


def show_result(run: Run) -> None:
    """Where the run stands, and what to do next."""
    from shoal.train.run import best_text

    record = run.record
    target = record.target_steps
    facts = {
        "run": run.name,
        "state": str(run.state),
        "steps": f"{run.step:,}{f' of {target:,}' if target else ''}",
        "val": values_text(record.last_eval("val")),
        "test": values_text(record.last_eval("test")),
        "best": best_text(record),
        "checkpoint": _checkpoint_text(run),
        "next": _next_text(run),
    }
    show_facts({name: text for name, text in facts.items() if text})


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
    model = str(identity.get("recipe", "")).rpartition(":")[2].lower() or "NAME"
    return f"shoal register {model} {run.name} --alias champion"
