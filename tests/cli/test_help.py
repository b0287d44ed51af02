"""Help is quick, loads nothing heavy, and what it teaches works."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from projects import ROOT
from shoal.cli.app import app
from shoal.cli.command import EXAMPLES

HEAVY = {"torch", "ray", "mlflow", "pandas", "numpy", "pydantic", "optuna", "yaml", "psutil"}


def commands() -> dict[str, object]:
    from typer.main import get_command

    return dict(get_command(app).commands)  # type: ignore[attr-defined]


def test_help_takes_little_cpu_and_loads_nothing_heavy() -> None:
    code = (
        "import resource, sys\n"
        "from shoal.cli import main\n"
        "sys.argv = ['shoal', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('heavy:', sorted({HEAVY!r} & set(sys.modules)))\n"
        "print('cpu:', sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PYTHONPATH": str(ROOT / "platform"), "PATH": ""},
    )
    *_, heavy, cpu = done.stdout.splitlines()
    assert heavy == "heavy: []"
    assert float(cpu.removeprefix("cpu: ")) < 0.5  # seconds; the interpreter's own start included


def test_every_command_is_in_a_panel_and_shows_an_example() -> None:
    for name, found in commands().items():
        assert found.rich_help_panel in ("Cluster", "Work", "Models & apps"), name  # type: ignore[attr-defined]
        assert f"shoal {name}" in (found.help or "").partition("Examples:")[2], name  # type: ignore[attr-defined]


def test_help_breaks_its_text_where_the_terminal_does() -> None:
    for name, found in commands().items():
        text = (found.help or "").partition("Examples:")[0]  # type: ignore[attr-defined]
        assert all("\n" not in paragraph.strip() for paragraph in text.split("\n\n")), name


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.startswith("shoal ")])
def test_every_example_is_a_valid_command_line(example: str) -> None:
    _, name, *words = shlex.split(example)
    commands()[name].make_context(name, words)  # type: ignore[attr-defined]


def test_fields_may_stand_before_and_after_options() -> None:
    context = commands()["train"].make_context(  # type: ignore[attr-defined]
        "train", ["jobs.digits", "lr=1e-3", "--workers", "2", "hidden=64"]
    )
    assert context.params["fields"] == ["lr=1e-3", "hidden=64"]
    assert context.params["workers"] == "2"
