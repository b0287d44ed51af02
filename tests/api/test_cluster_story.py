"""Train, kill, resume, register and serve through the public API, on one shared cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal
from committed import folder_of
from projects import ROOT
from shoal import api
from shoal.errors import CorruptError, IdentityError, NotFoundError, RecipeError, RequestError
from shoal.tracking import RunRecord, RunState, ensure_tracker, timeline_of
from shoal.train.checkpoints import read_checkpoint
from waiting import wait_until

pytestmark = pytest.mark.cluster
STEPS = 300


@pytest.fixture(scope="module")
def attached(cluster: Any) -> Iterator[shoal.Cluster]:
    sys.path.insert(0, str(cluster.project))
    yield api.attach(cluster)
    sys.path.remove(str(cluster.project))


@pytest.fixture(scope="module")
def trained(attached: shoal.Cluster) -> shoal.Run:
    """An undisturbed run on two workers."""
    return attached.train(slow_digits(), workers=2, steps=STEPS, name="undisturbed").wait(progress=False)


def slow_digits(**fields: Any) -> Any:
    from jobs.digits import Digits

    return Digits(**{"eval_every": 100, "hidden": 64, **fields})


def weights_of(run: shoal.Run) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder_of(run.record, STEPS)).model


def assert_same_weights(one: shoal.Run, other: shoal.Run) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_worker_that_is_killed_costs_neither_a_step_nor_a_bit(
    attached: shoal.Cluster, trained: shoal.Run
) -> None:
    run = attached.train(slow_digits(), workers=2, steps=STEPS, name="killed-worker", checkpoint_every="1h")
    wait_until(lambda: run.step >= 130, lambda: repr(run))
    reached = run.step
    os.kill(run.pids[0], signal.SIGKILL)
    run.wait(progress=False)
    starts = run.record.events(("start",))
    assert run.state == RunState.FINISHED
    assert len(starts) == 2
    assert starts[1]["step"] >= reached, "the other worker commits the boundary that both had reached"
    timeline = timeline_of(run.record.events())
    lost = [moment.detail for moment in timeline.moments if moment.kind == "lost"]
    assert lost == [f"rank 0 (pid {starts[0]['pids'][0]})"]
    assert (len(timeline.recoveries_s), timeline.steps_lost) == (1, 0)
    assert [event["workers"] for event in run.record.events(("driver", "grant"))] == ["2", 2]
    assert_same_weights(run, trained)


DRIVER = """
import sys; sys.path.insert(0, sys.argv[1])
import shoal
from jobs.digits import Digits
cluster = shoal.connect()
cluster.train(Digits(eval_every=100, hidden=64), workers=2, steps=300, name="killed-driver",
              checkpoint_every=0.05).wait(progress=False)
"""


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_a_run_that_the_same_command_goes_on_with(
    attached: shoal.Cluster, trained: shoal.Run
) -> None:
    environment = {
        **os.environ,
        "SHOAL_CLUSTER": str(attached.info.record),
        "PYTHONPATH": str(ROOT / "platform"),
    }
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(attached.info.project)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        record = RunRecord(attached.storage, "killed-driver")
        wait_until(lambda: record.step >= 50, lambda: f"step {record.step}")
    finally:
        driver.kill()
        driver.wait(timeout=60)
    wait_until(lambda: not record.is_locked(), "its workers have ended")
    assert attached.run("killed-driver").state == RunState.INTERRUPTED
    again = attached.train(slow_digits(), workers=2, steps=STEPS, name="killed-driver").wait(progress=False)
    assert again.record.events(("start",))[-1]["step"] > 0
    assert_same_weights(again, trained)


def test_a_run_stopped_by_request_commits_first(attached: shoal.Cluster) -> None:
    run = attached.train(slow_digits(), workers=1, steps=100_000, name="stopped")
    wait_until(lambda: run.step >= 10, lambda: repr(run))
    run.stop()
    run.wait(progress=False)
    assert run.state == RunState.STOPPED
    assert folder_of(run.record, run.step).is_dir()


def test_a_finished_run_is_returned_saying_so(attached: shoal.Cluster, trained: shoal.Run) -> None:
    again = attached.train(slow_digits(), workers=2, steps=STEPS, name="undisturbed")
    assert "finished before" in again.note
    assert len(again.record.events(("start",))) == 1


def test_the_same_name_with_other_fields_shows_the_difference(
    attached: shoal.Cluster, trained: shoal.Run
) -> None:
    with pytest.raises(IdentityError, match=r"lr: it has 0\.001, you asked for 0\.5"):
        attached.train(slow_digits(lr=0.5), name="undisturbed")


def test_more_workers_than_there_can_be_are_refused_and_nothing_is_written(attached: shoal.Cluster) -> None:
    with pytest.raises(RequestError, match=r"64 workers .* can never start"):
        attached.train(slow_digits(), workers=64, name="too-many")
    assert not attached.storage.run_dir("too-many").exists()


def test_a_broken_recipe_ends_at_once_with_its_own_error(attached: shoal.Cluster) -> None:
    class Broken(type(slow_digits())):  # type: ignore[misc]
        """Its loss is no number."""

        def loss(self, model: Any, batch: Any) -> Any:
            raise KeyError("pixels")

    run = attached.train(Broken(), workers=1, steps=10, name="broken")
    with pytest.raises(RecipeError, match="KeyError: 'pixels'") as caught:
        run.wait(progress=False)
    assert "raise KeyError" in caught.value.traceback_text
    assert len(run.record.events(("start",))) == 1, "no retries"


def test_register_predict_and_move_an_alias(attached: shoal.Cluster, trained: shoal.Run) -> None:
    first = attached.models.register("story", trained, alias="champion")
    second = attached.models.register("story", trained)
    test = slow_digits().build_data().test
    accuracy = (first.predict(test).argmax(dim=1) == test.tensors[1]).float().mean()
    assert accuracy > 0.9
    assert attached.models.get("story@champion").version == first.version
    attached.models.set_alias("story", "champion", second.version)
    assert attached.models.get("story@champion").version == second.version


def test_what_is_not_there_is_named_with_what_is(attached: shoal.Cluster, trained: shoal.Run) -> None:
    with pytest.raises(NotFoundError, match="undisturbed"):
        attached.run("nobody")
    attached.models.register("known", trained)
    with pytest.raises(NotFoundError, match="known"):
        attached.models.get("unknown")
    with pytest.raises(NotFoundError, match="versions 1"):
        attached.models.get("known@7")


def test_a_run_without_a_checkpoint_cannot_be_registered(attached: shoal.Cluster) -> None:
    run = shoal.Run(RunRecord(attached.storage, "too-many"))
    with pytest.raises(NotFoundError, match="no checkpoint yet"):
        attached.models.register("nothing", run)


def test_a_changed_model_file_is_noticed(attached: shoal.Cluster, trained: shoal.Run) -> None:
    model = attached.models.register("tampered", trained)
    weights = Path(model.path, "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(content)
    with pytest.raises(CorruptError):
        model.load()
    with pytest.raises(CorruptError):
        attached.serve("serve_apps.digits:app", model=model.name, name="tampered")


def test_runs_reach_mlflow(attached: shoal.Cluster, trained: shoal.Run) -> None:
    tracker = ensure_tracker(attached.info)
    wait_until(lambda: tracker.flush().behind_runs == 0, lambda: repr(tracker.status()))
    assert tracker.status().state == "ok"
