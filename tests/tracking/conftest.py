"""A store that stands in for MLflow's, and MLflow itself on a database migrated once (it takes 7 s).

`test_tracker.py` holds both to the same contract.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field

import pytest

from shoal.errors import NotFoundError, RequestError, TrackingError


@dataclass
class FakeRun:
    name: str
    experiment: str
    journal: str
    state: str = ""
    metrics: set = field(default_factory=set)
    """Without those of the timeline."""
    timeline: set = field(default_factory=set)
    params: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    deleted: bool = False


class FakeStore:
    """Runs in memory. ``down`` makes every call fail; ``refused`` is a metric that is never accepted."""

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.down = False
        self.refused = ""
        self.num_calls = 0
        self.settled = threading.Event()
        """Set once some run has finished."""
        self._fails_at = -1

    def fail_after(self, num_answers):
        """Answer that many more calls, fail one, and answer again."""
        self._fails_at = self.num_calls + num_answers + 1

    def ensure_run(self, *, experiment, name, journal, start_ms, tags):
        self._answer()
        for run_id, run in self.runs.items():
            if run.journal == journal:
                return run_id
        run_id = f"run-{len(self.runs)}"
        self.runs[run_id] = FakeRun(name, experiment, journal, tags=dict(tags))
        return run_id

    def is_active(self, run_id):
        self._answer()
        return run_id in self.runs and not self.runs[run_id].deleted

    def log(self, run_id, batch):
        run = self._run(run_id)
        if any(point.key == self.refused for point in batch.metrics):
            raise RequestError(f"refused: {self.refused}")
        for key, value, timestamp, step in batch.metrics:
            kept = run.timeline if key.startswith("timeline/") else run.metrics
            kept.add((key, step, timestamp, repr(value)))
        run.params |= dict(batch.params)
        run.tags |= dict(batch.tags)

    def set_state(self, run_id, state, *, end_ms):
        self._run(run_id).state = state
        if state == "finished":
            self.settled.set()

    def log_text(self, run_id, text, path):
        self._run(run_id).files[path] = text
        return True

    def _run(self, run_id):
        self._answer()
        if run_id not in self.runs:
            raise NotFoundError(f"no run {run_id}")
        if self.runs[run_id].deleted:
            raise RequestError(f"run {run_id} must be active")
        return self.runs[run_id]

    def _answer(self):
        self.num_calls += 1
        if self.down or self.num_calls == self._fails_at:
            raise TrackingError("down")


@pytest.fixture
def fake():
    """An empty store in memory."""
    return FakeStore()


@pytest.fixture(scope="session")
def migrated_db(tmp_path_factory):
    """Path of an empty database with MLflow's tables; copy it, do not write to it."""
    from shoal.tracking.mlflow_store import MlflowStore

    folder = tmp_path_factory.mktemp("mlflow")
    store = MlflowStore(f"sqlite:///{folder}/mlflow.db", artifacts_dir=folder / "artifacts")
    assert store.client.search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def open_mlflow(migrated_db, tmp_path):
    """A function that opens MLflow on a database of this test's own; again gives the same database."""
    from shoal.tracking.mlflow_store import MlflowStore

    tracking = tmp_path / "tracking"
    tracking.mkdir()
    shutil.copy(migrated_db, tracking / "mlflow.db")
    return lambda: MlflowStore(f"sqlite:///{tracking}/mlflow.db", artifacts_dir=tracking / "artifacts")
