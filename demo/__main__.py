"""Tune, train through a ``kill -9``, register, serve and ask: fails unless all of it is so.

``KEEP=1`` leaves the cluster and the app running.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

import shoal
from benchmarks.load import run_load
from jobs.digits import Digits
from shoal.api import bring_up
from shoal.cluster import find
from shoal.config import load
from shoal.recipe import replace

PROJECT = Path(__file__).resolve().parent.parent
STEPS = 3000
GOAL = 0.97
"""What the served model must score on test images that neither training nor the sweep saw."""
RECOVERY_LIMIT_S = 30.0
"""From a death to the next completed step: below 1 s on two quiet cores (2026-11-25), and a busy machine has room."""
DEADLINE_S = 120.0


@dataclass
class Story:
    """What happened, line by line, and whether it was as promised."""

    console: Console
    started: float = field(default_factory=time.monotonic)
    rows: list[tuple[str, str, bool]] = field(default_factory=list)

    def chapter(self, text: str) -> None:
        """Say what comes next."""
        self.console.print(f"\n[bold cyan]{time.monotonic() - self.started:5.0f} s[/]  [bold]{text}[/]")

    def note(self, what: str, value: str, *, ok: bool = True) -> None:
        """One row of the summary; ``ok`` says whether it is as it must be."""
        self.rows.append((what, value, ok))

    def table(self) -> Table:
        """The summary."""
        table = Table(title="shoal: one cluster, one file, one command", title_style="bold", min_width=76)
        table.add_column("what")
        table.add_column("result")
        table.add_column("")
        for what, value, ok in self.rows:
            table.add_row(what, value, "[green]ok[/]" if ok else "[bold red]NOT SO[/]")
        return table

    @property
    def is_as_promised(self) -> bool:
        return all(ok for _, _, ok in self.rows)


def main() -> int:
    """Tell the story; the exit status says whether it ended well."""
    story = Story(Console(width=min(100, Console().width)))
    with running_cluster(story) as cluster:
        tell(story, cluster)
        story.console.print()
        story.console.print(story.table())
        if save := os.environ.get("SHOAL_DEMO_SVG"):
            save_picture(story, Path(save))
        say_what_next(story)
    return 0 if story.is_as_promised else 1


@contextmanager
def running_cluster(story: Story) -> Iterator[shoal.Cluster]:
    """The project's cluster, up; down again at the end unless it ran before or ``KEEP=1``."""
    os.chdir(PROJECT)
    ran_before = find(PROJECT) is not None
    story.chapter("A Ray cluster from cluster.yaml: loopback only, token on")
    bring_up(load(PROJECT), PROJECT, say=lambda text: story.console.print(f"         {text}"))
    cluster = shoal.connect(PROJECT)
    try:
        yield cluster
    finally:
        if not ran_before and not os.environ.get("KEEP"):
            cluster.down()


def tell(story: Story, cluster: shoal.Cluster) -> None:
    """Every chapter."""
    tag = time.strftime("%m%d-%H%M%S")  # names of its own: runs and sweeps are resumed by name
    story.chapter("A sweep: Optuna suggests, ASHA prunes, every trial is a run in the record")
    space = {"lr": shoal.loguniform(3e-4, 3e-2), "hidden": shoal.choice([64, 128, 256])}
    sweep = cluster.tune(Digits(), space, trials=8, concurrent=2, steps=400, name=f"demo-sweep-{tag}").wait()
    best = sweep.best
    pruned = sum(trial.state == "pruned" for trial in sweep.trials)
    story.note(
        f"best of {len(sweep.trials)} trials ({pruned} pruned)",
        f"{best.run}: validation accuracy {best.value:.4f}",
        ok=len(sweep.trials) == 8 and all(trial.state in ("finished", "pruned") for trial in sweep.trials),
    )

    story.chapter("Train the best with 2 workers; one of them dies of kill -9 half way")
    run = train_and_kill(story, cluster, replace(Digits(), **best.fields), f"demo-{tag}")

    story.chapter("Register the best checkpoint, serve it, ask it")
    model = cluster.models.register("digits", run, alias="champion")
    story.note("registered", f"{model.name}, alias champion, from {run.name}")
    app = cluster.serve("serve_apps.digits:app", model="digits@champion")
    served_accuracy(story, cluster, app)
    measure_serving(story, cluster)
    story.note("app", f"{app.url}  (pages: {app.url}/docs)")
    story.note("dashboard", cluster.info.dashboard_url)


def train_and_kill(story: Story, cluster: shoal.Cluster, recipe: Digits, name: str) -> shoal.Run:
    """Train, kill one worker half way, and note what it cost."""
    run = cluster.train(recipe, workers=2, steps=STEPS, checkpoint_every=0.5, name=name)
    wait_until(lambda: run.step >= STEPS // 2 or not run.is_active, f"run {name} to be half way")
    victim, killed_at = run.pids[1], run.step
    os.kill(victim, signal.SIGKILL)
    story.console.print(f"         kill -9 {victim} (rank 1) at step {killed_at:,}")
    run.wait()
    starts = run.record.events(("start",))
    resumed = starts[-1]
    timeline = run.timeline()
    story.note("trained", f"{run.step:,} steps on {resumed['workers']} workers", ok=run.step == STEPS)
    story.note("killed", f"rank 1 at step {killed_at:,} with kill -9", ok=len(starts) == 2)
    story.note("resumed from", f"step {resumed['step']:,}", ok=resumed["step"] > 0)
    lost = timeline.steps_lost  # none: a survivor commits the very step that it holds
    story.note("steps lost (computed twice)", f"{lost:,}", ok=lost == 0)
    recoveries_s = timeline.recoveries_s
    story.note(
        "recovery, death to next step",
        ", ".join(f"{seconds:.2f} s" for seconds in recoveries_s),
        ok=len(recoveries_s) == 1 and recoveries_s[0] < RECOVERY_LIMIT_S,
    )
    story.note(
        "goodput, its start counted too",
        f"{timeline.goodput:.0%} of {timeline.wall_s:.0f} s went into steps that count",
    )
    test = run.record.last_eval("test") or {}
    story.note(
        "test accuracy of the run", f"{test.get('accuracy', 0):.4f}", ok=test.get("accuracy", 0) >= GOAL
    )
    return run


def served_accuracy(story: Story, cluster: shoal.Cluster, app: shoal.App) -> None:
    """Send every test image as a PNG file."""
    folder = cluster.storage.root / "demo"
    files = write_pictures(folder)
    right = sum(app.predict(path)["class"] == label for path, label in files)
    accuracy = right / len(files)
    story.note(
        "accuracy of the served model",
        f"{accuracy:.4f} on {len(files)} unseen PNG files",
        ok=accuracy >= GOAL,
    )


def write_pictures(folder: Path) -> list[tuple[Path, int]]:
    """The test images as PNG files, dark ink on light paper, 128 x 128; and what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    test = Digits().build_data().test
    files = []
    for number in range(len(test)):  # type: ignore[arg-type]
        pixels, label = test[number]  # type: ignore[index]
        image = Image.fromarray((255 - pixels.numpy() * 255).round().astype("uint8"))
        path = folder / f"{number:03d}-is-{int(label)}.png"
        image.resize((128, 128), Image.Resampling.NEAREST).save(path)
        files.append((path, int(label)))
    return files


def measure_serving(story: Story, cluster: shoal.Cluster) -> None:
    """A few seconds of load."""
    test = Digits().build_data().test
    document = {"pixels": (test[0][0] * 16).tolist()}  # type: ignore[index]
    body = json.dumps(document).encode()
    port = cluster.info.serve_port
    result = run_load(port, "/predict", body, "application/json", connections=16, seconds=4)
    story.note(
        "under load, 16 connections",
        f"{result.requests_per_s:,.0f} requests/s, p50 {result.p50_ms:.1f} ms, p99 {result.p99_ms:.1f} ms, "
        f"{result.num_errors} errors",
        ok=result.num_errors == 0 and result.requests_per_s > 0,
    )


def say_what_next(story: Story) -> None:
    """Where to go from here."""
    keep = "it is still up" if os.environ.get("KEEP") else "bring it back with: .venv/bin/shoal up"
    story.console.print(
        f"\nNext ({keep}):\n"
        "  .venv/bin/shoal serve serve_apps.digits:app --model digits@champion\n"
        "  curl -F file=@docs/seven.png http://127.0.0.1:8000/predict\n"
        "  .venv/bin/shoal runs        .venv/bin/shoal models        .venv/bin/shoal ui\n"
        "  edit jobs/digits.py, then:  .venv/bin/shoal train jobs.digits lr=2e-3 --workers 1..2",
        markup=False,
        highlight=False,
    )


def save_picture(story: Story, path: Path) -> None:
    """The summary as an SVG, for the README."""
    console = Console(record=True, width=92, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(story.table())
    console.save_svg(str(path), title="make demo")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise shoal.errors.DeadlineExceeded(f"waited {DEADLINE_S:g} s for {what}")
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
