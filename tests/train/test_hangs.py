"""A worker that hangs is named, and replaced within seconds: on a real cluster."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import hanging
from shoal.capacity import Resources
from shoal.config import Range
from shoal.storage import Storage
from shoal.tracking import RunState
from shoal.train.driver import launch
from shoal.train.run import Run
from shoal.train.spec import RunSpec
from waiting import wait_until

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
ONE_CPU: Resources = {"CPU": 1}
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def on_workers_path(cluster: ClusterInfo) -> Iterator[None]:
    names = [cluster.project / name for name in ("hanging.py", "toy.py")]
    for name in names:
        name.symlink_to(HERE / name.name)
    yield
    for name in names:
        name.unlink()


@pytest.fixture
def train(on_workers_path: None, tmp_path: Path) -> Callable[..., Run]:
    def build(how: str, ranks: str = "1", *, workers: int = 2, retries: int = 2, name: str = "hung") -> Run:
        recipe = hanging.Hanging(how=how, ranks=ranks, marks=str(tmp_path))
        spec = RunSpec(
            recipe=recipe,
            name=name,
            storage=Storage(tmp_path / "storage"),
            target_steps=hanging.Hanging.steps,
            checkpoint_every_s=1e6,
            threads=1,
        )
        return launch(spec, workers=Range(workers, workers), resources_per_worker=ONE_CPU, retries=retries)

    return build


def line_of(method: Callable[..., Any], text: str) -> int:
    lines, first = inspect.getsourcelines(method)
    return first + next(i for i, line in enumerate(lines) if text in line)


def seconds_lost(folder: Path) -> float:
    return float((folder / "went-on").read_text()) - float((folder / "hung").read_text())


def stalls(run: Run) -> list[dict[str, Any]]:
    return run.record.events(("stall",))


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        ("stop", 1),
        pytest.param("stop", 0, marks=pytest.mark.chaos),
        pytest.param("hold", 1, marks=pytest.mark.chaos),
        ("deadlock", 1),
    ],
)
def test_a_rank_that_hangs_is_named_and_replaced_within_seconds(
    train: Callable[..., Run], tmp_path: Path, how: str, rank: int
) -> None:
    run = train(how, str(rank))
    run.wait(progress=False, timeout_s=120)
    assert run.state == RunState.FINISHED
    (stall,) = stalls(run)
    first, second = run.record.events(("start",))
    assert (stall["ranks"], stall["pids"]) == ([rank], [first["pids"][rank]])
    assert (stall["phase"], stall["replaced"]) == ("step", True)
    # It hung when its gradients were on their way: the other worker may have had them, and one step more.
    assert stall["step"] - hanging.HANGS_AT in (0, 1)
    assert second["step"] >= stall["step"], "the other worker commits the boundary that it has"
    (place,) = stall["places"]
    if how == "deadlock":
        line = line_of(hanging.Hanging.deadlock, "the line that the stack shows")
        assert place == f"hanging.py:{line} in deadlock"
    assert place.startswith("hanging.py:")  # one that was woken may have gone a few lines further
    assert "hanging.py" in stall["stack"]
    assert "hanging.py" in run.logs(rank)
    print(f"\n{how} of rank {rank}: verdict {stall['seconds']} s, next step {seconds_lost(tmp_path):.1f} s")
    assert 5 <= stall["seconds"] < 8
    assert seconds_lost(tmp_path) < 15


@pytest.mark.chaos
def test_two_that_stop_at_once_cost_no_more_than_one(train: Callable[..., Run], tmp_path: Path) -> None:
    run = train("stop", "12", workers=3)
    run.wait(progress=False, timeout_s=120)
    assert run.state == RunState.FINISHED
    assert len(run.record.events(("start",))) == 2
    print(f"\ntwo stopped: {seconds_lost(tmp_path):.1f} s to the next step")
    assert seconds_lost(tmp_path) < 15


@pytest.mark.chaos
def test_ranks_that_wait_for_each_other_are_named_and_start_again(
    train: Callable[..., Run], tmp_path: Path
) -> None:
    run = train("apart")
    run.wait(progress=False, timeout_s=120)
    assert run.state == RunState.FINISHED
    (stall,) = stalls(run)
    assert (stall["ranks"], stall["why"]) == ([0, 1], "waited for each other")
    assert stall["places"][1].endswith("in apart")
    print(f"\napart: {seconds_lost(tmp_path):.1f} s to the next step")


def test_without_a_restart_left_a_hang_is_said_and_nothing_is_killed(
    train: Callable[..., Run], tmp_path: Path
) -> None:
    run = train("deadlock", retries=0)
    wait_until(lambda: stalls(run), lambda: repr(run))
    assert stalls(run)[0]["replaced"] is False
    os.kill(run.pids[1], 0)
    run.abort()
