"""Runs that get more and fewer workers while they train, by request and by themselves, on the shared cluster."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from committed import folder_of
from shoal import api
from shoal.errors import RequestError
from shoal.tracking import RunState
from waiting import wait_until

pytestmark = pytest.mark.cluster
STEPS = 600
EXACT: dict[str, Any] = {"exact": True, "shards": 8, "steps": STEPS}

PACED = '''
import time
from pathlib import Path

from jobs.digits import Digits


class Paced(Digits):
    """Digits, of at most 50 steps a second until the test is in a hurry."""

    def loss(self, model, batch):
        if model.training and not Path(__file__).with_name("hurry").exists():
            time.sleep(0.02)
        return super().loss(model, batch)
'''


@pytest.fixture
def attached(cluster: Any) -> Iterator[shoal.Cluster]:
    (cluster.project / "elastic_paced.py").write_text(PACED)
    sys.path.insert(0, str(cluster.project))
    hurry = cluster.project / "hurry"
    hurry.unlink(missing_ok=True)
    yield api.attach(cluster)
    hurry.touch()
    sys.path.remove(str(cluster.project))


def paced() -> Any:
    from elastic_paced import Paced

    return Paced(hidden=32, eval_every=200)


def hurry(cluster: shoal.Cluster) -> None:
    (cluster.info.project / "hurry").touch()


def bytes_of(run: shoal.Run) -> str:
    folder: Path = folder_of(run.record, STEPS)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def wait_workers(run: shoal.Run, count: int) -> None:
    wait_until(lambda: run.workers == count or not run.is_active, lambda: f"{count} workers: {run!r}")
    assert run.is_active, repr(run)


def test_resized_by_request_an_exact_run_loses_no_step_and_ends_with_the_same_bytes(
    attached: shoal.Cluster,
) -> None:
    run = attached.train(paced(), workers=2, name="elastic", checkpoint_every="1h", **EXACT)
    wait_until(lambda: run.step >= 10, lambda: repr(run))
    attached.run("elastic").resize(1)  # as another process would
    wait_workers(run, 1)
    with pytest.raises(RequestError, match=r"5 workers with 1 CPU each can never start"):
        run.resize(5)
    run.resize(2)
    wait_workers(run, 2)
    hurry(attached)
    run.wait(progress=False)
    assert run.state is RunState.FINISHED
    starts, resizes = run.record.events(("start",)), run.record.events(("resize",))
    assert [(line["from"], line["to"]) for line in resizes] == [(2, 1), (1, 2)]
    assert [line["workers"] for line in starts] == [2, 1, 2]
    assert [line["step"] for line in starts] == [0, *(line["step"] for line in resizes)], "no step is lost"
    undisturbed = attached.train(paced(), workers=3, name="inelastic", **EXACT).wait(progress=False)
    assert bytes_of(run) == bytes_of(undisturbed)


def test_a_run_grows_by_itself_into_room_that_becomes_free(attached: shoal.Cluster) -> None:
    import ray

    @ray.remote(num_cpus=3)
    class App:
        def ready(self) -> bool:
            return True

    replica = App.remote()
    ray.get(replica.ready.remote())
    wait_until(lambda: ray.available_resources().get("CPU") == 1, "the app's CPUs are taken")
    run = attached.train(paced(), workers="1..2", name="growing", steps=100_000)
    wait_until(lambda: run.step >= 10, lambda: repr(run))
    assert run.workers == 1
    ray.kill(replica)
    wait_workers(run, 2)
    reached = run.step
    wait_until(lambda: run.step > reached, lambda: repr(run))
    run.stop()
    run.wait(progress=False)
    assert run.state is RunState.STOPPED
