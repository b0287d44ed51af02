"""A run that another process drives is the run that was asked for: a detached job's, and torchrun's."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Shoal

import shoal
from shoal.cli.app import app
from shoal.cli.detached import entrypoint
from shoal.cli.job import make_job_app
from shoal.cli.torchrun import _spec, _train
from shoal.errors import InternalError, NotFoundError, RecipeError, RequestError
from shoal.recipe import field_values, parse_fields
from shoal.train.options import RunOptions
from shoal.train.revision import code_revision


class Tagged(shoal.Recipe):
    """Has fields whose values have no text that reads back as themselves."""

    lr: float = 1e-3
    tag: str | None = None
    sizes: tuple[int, ...] = (1, 2)


@pytest.mark.parametrize("words", [[], ["lr=1e-2"], ["tag=a b"]])
def test_a_detached_run_has_the_fields_that_were_typed(words: list[str]) -> None:
    recipe = parse_fields(Tagged, words)
    command = entrypoint(recipe, words, RunOptions(seed=3), "/a b")
    ref = f"{Tagged.__module__}:Tagged"
    expected = [sys.executable, "-m", "shoal.cli", "train", ref, *words, "--seed=3"]
    assert shlex.split(command) == ["cd", "/a b", "&&", "exec", *expected]
    assert field_values(parse_fields(Tagged, shlex.split(command)[9:-1])) == field_values(recipe)


def test_a_field_that_is_typed_twice_is_refused_with_both_values() -> None:
    with pytest.raises(RecipeError, match=r"lr: given twice, as '0\.1' and '0\.2'"):
        parse_fields(Tagged, ["lr=0.1", "lr=0.2"])


def test_under_torchrun_a_run_starts_from_a_version_on_storage(project: Path) -> None:
    version = project / ".shoal" / "models" / "digits" / "12"
    version.mkdir(parents=True)
    spec = _spec(Tagged(), RunOptions(init_from="digits@12"))
    assert (spec.init_from, spec.init_from_name) == (version, "digits@12")
    assert spec.name != _spec(Tagged(), RunOptions()).name


def test_under_torchrun_a_run_records_the_code_revision(project: Path) -> None:
    assert code_revision(project) == ""  # so that the next line is the commit's doing
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", "-C", str(project), *words], check=True)
    revision = code_revision(project)
    assert revision
    assert _spec(Tagged(), RunOptions()).revision == revision


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("digits", RequestError, "name a version by number, as digits@1"),
        ("digits@champion", RequestError, "name a version by number, as digits@1"),
        ("../up@1", RequestError, "model"),
        ("digits@2", NotFoundError, "models/digits/2"),
    ],
)
def test_under_torchrun_other_models_are_refused(
    project: Path, text: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        _spec(Tagged(), RunOptions(init_from=text))


@pytest.mark.parametrize(
    ("raised", "kind", "exit_code"),
    [
        (ZeroDivisionError("by zero"), RecipeError, 2),
        (RequestError("no such split"), RequestError, 2),
        (InternalError("a bug"), InternalError, 70),
    ],
)
def test_under_torchrun_a_failure_is_of_the_kind_that_was_recorded(
    project: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception], exit_code: int
) -> None:
    from shoal.train.group import Group
    from toy import Toy

    class Failing(Toy):
        def loss(self, model: Any, batch: Any) -> Any:
            raise raised

    spec = _spec(Failing(), RunOptions())
    with pytest.raises(kind, match=str(raised)) as failure:
        _train(spec, Group.alone())
    assert type(failure.value) is kind
    monkeypatch.setattr("shoal.train.engine.train_worker", lambda *_: None)  # rank 0 has recorded the end
    with pytest.raises(SystemExit) as end:  # of the others: the first says why
        _train(spec, replace(Group.alone(), rank=1))
    assert end.value.code == exit_code


@pytest.mark.parametrize("option", ["--dry-run", "--detach"])
def test_under_torchrun_what_takes_one_process_is_refused(
    project: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr("shoal.cli.torchrun.train_under_torchrun", lambda *_: pytest.fail("it trained"))
    outcome = shoal("train", "jobs.digits", option)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"{option} takes one process: leave torchrun out" in outcome.err
    assert not (project / ".shoal").exists()


@pytest.mark.parametrize("name", ["train", "tune"])
def test_a_job_takes_the_options_of_the_shells_command(name: str) -> None:
    def options(group: typer.Typer) -> list[tuple[str, ...]]:
        command = typer.main.get_command(group).commands[name]  # type: ignore[attr-defined]
        return [(option.name, *option.opts, str(option.default)) for option in command.params]

    module, *others = options(app)
    assert module[0] == "module"
    assert options(make_job_app(Tagged)) == [option for option in others if option[0] != "detach"]


def test_a_job_trains_its_own_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(
        "shoal.cli.train.start", lambda recipe, options, **_: started.append((recipe, options))
    )
    with pytest.raises(SystemExit) as end:
        make_job_app(Tagged)(["train", "lr=0.5", "--workers", "1..2"])
    assert end.value.code == 0
    assert started == [(Tagged(lr=0.5), RunOptions(workers="1..2"))]
