"""A cluster ends with the process that started it, and with no other; without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from projects import write_project
from shoal.api import connection
from shoal.config import load


@dataclass
class Fakes:
    """What `shoal.api` reaches of the cluster room, replaced."""

    up_gives: str | None = None
    """Id of the cluster that ``up`` finds; None: it starts the planned one."""
    recorded: str | None = None
    """Id in the project's record."""
    at_exit: list[Callable[[], None]] = field(default_factory=list)
    downs: list[Path] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes()

    def up_plan(plan: Any, **_: object) -> Any:
        fakes.recorded = fakes.up_gives or plan.cluster_id
        return SimpleNamespace(
            cluster_id=fakes.recorded, project=plan.project, record=plan.project / "cluster.json"
        )

    def register(function: Callable[..., None], *arguments: Any) -> None:
        fakes.at_exit.append(lambda: function(*arguments))

    monkeypatch.setattr(connection, "up_plan", up_plan)
    monkeypatch.setattr(
        connection, "read_record", lambda _: fakes.recorded and SimpleNamespace(cluster_id=fakes.recorded)
    )
    monkeypatch.setattr(connection, "attach_driver", lambda info: fakes.prepared.append(info.cluster_id))
    monkeypatch.setattr(connection, "ensure_tracker", lambda _: None)
    monkeypatch.setattr(connection, "detach", lambda: None)
    monkeypatch.setattr(connection.clusters, "find", lambda _: None)
    monkeypatch.setattr(connection, "_down_apart", fakes.downs.append)
    monkeypatch.setattr(connection.atexit, "register", register)
    return fakes


def start(folder: Path) -> None:
    """As `connect` does where no cluster runs."""
    project = write_project(folder)
    connection._start(load(project), project)


def test_a_cluster_that_connect_started_ends_with_the_process(tmp_path: Path, fakes: Fakes) -> None:
    start(tmp_path)
    assert fakes.prepared == [fakes.recorded]
    for end in fakes.at_exit:
        end()
    assert fakes.downs == [tmp_path]


def test_one_that_another_process_started_meanwhile_does_not(tmp_path: Path, fakes: Fakes) -> None:
    fakes.up_gives = "another"
    start(tmp_path)
    assert (fakes.at_exit, fakes.prepared) == ([], [])


@pytest.mark.parametrize("recorded", [None, "a later one"])
def test_one_that_was_ended_or_replaced_is_let_be(tmp_path: Path, fakes: Fakes, recorded: str | None) -> None:
    start(tmp_path)
    fakes.recorded = recorded
    for end in fakes.at_exit:
        end()
    assert len(fakes.at_exit) == 1
    assert fakes.downs == []


def test_what_shoal_up_starts_stays(tmp_path: Path, fakes: Fakes) -> None:
    project = write_project(tmp_path)
    connection.bring_up(load(project), project, say=print)
    assert (len(fakes.prepared), fakes.at_exit) == (1, [])


def test_the_end_outlives_the_process_that_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    connection._down_apart(write_project(tmp_path))  # no cluster runs: it says nothing
    assert capfd.readouterr() == ("", "")
    session = "import os, sys; open(sys.argv[1] + '/session', 'w').write(str(os.getsid(0)))"
    monkeypatch.setattr(connection, "_DOWN", session)
    connection._down_apart(tmp_path)
    assert (tmp_path / "session").read_text() != str(os.getsid(0)), "signals to our group reach it"
