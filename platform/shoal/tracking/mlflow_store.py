"""The only module that speaks to MLflow. Its errors leave here as shoal's.

One process per storage may open MLflow's sqlite store: several that migrate a new one at once crash
(MLflow 3.17, four processes, three crashed).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shoal.errors import NotFoundError, RequestError, ShoalError, TrackingError
from shoal.storage import make_directories
from shoal.storage.disk import FILE_MODE, storage_error
from shoal.tracking.delivery import Batch

JOURNAL_TAG = "shoal.journal"

_REQUEST_TIMEOUT_S = 5
_PAGE = 1000
_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "stopped": "KILLED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}


def quiet_environment() -> None:
    """Set what MLflow reads from the environment: no telemetry, no chatter, and short waits for a server that
    is gone. Waits that the user chose are kept.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_REQUEST_TIMEOUT_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


class MlflowStore:
    """Runs and model versions in MLflow at ``uri``. Making one imports MLflow (2 s) and may migrate (5 s).

    Every method may be repeated and used from any thread. All raise TrackingError when MLflow does not
    answer, NotFoundError when it does not know the run, model or version, RequestError when it refuses.
    """

    def __init__(self, uri: str, *, artifacts_dir: Path) -> None:
        quiet_environment()
        self.uri = without_credentials(uri)
        self._raw_uri = uri
        self._is_server = uri.startswith(("http://", "https://"))
        self._artifacts_dir = artifacts_dir
        if uri.startswith("sqlite:///"):
            _make_database(Path(uri.removeprefix("sqlite:///")))
        from mlflow.tracking import MlflowClient

        with self.translated():
            self.client = MlflowClient(uri, uri)
            self.client.search_experiments(max_results=1)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise MLflow's errors, and those of the libraries below it, as shoal's."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except ShoalError:
            raise
        except MlflowException as error:
            message = _without_secret(str(error), self._raw_uri, self.uri)
            code = getattr(error, "error_code", "")
            if code == "RESOURCE_DOES_NOT_EXIST":
                raise NotFoundError(message) from error
            if code == "INVALID_PARAMETER_VALUE" or _cannot_hold(error):
                raise RequestError(f"MLflow at {self.uri} refused: {message}") from error
            raise self._trouble(message) from error
        except Exception as error:  # sqlalchemy, requests, alembic: whatever the store is made of
            message = _without_secret(repr(error), self._raw_uri, self.uri)
            if _cannot_hold(error):
                raise RequestError(f"MLflow at {self.uri} refused: {message}") from error
            raise self._trouble(message) from error

    def ensure_run(
        self, *, experiment: str, name: str, journal: str, start_ms: int, tags: Mapping[str, str]
    ) -> str:
        """The MLflow run of the journal with this id; made if there is none, found again after a crash."""
        with self.translated():
            experiment_id = self._ensure_experiment(experiment)
            found = self.client.search_runs(
                [experiment_id],
                filter_string=f"tags.`{JOURNAL_TAG}` = '{journal}'",
                run_view_type=3,
                max_results=1,
            )
            if found:
                return str(found[0].info.run_id)
            created = self.client.create_run(
                experiment_id, start_time=start_ms, tags={**tags, JOURNAL_TAG: journal}, run_name=name
            )
            return str(created.info.run_id)

    def is_active(self, run_id: str) -> bool:
        """Whether the run takes more entries: it exists and nobody deleted it in MLflow."""
        try:
            with self.translated():
                return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except NotFoundError:
            return False

    def log(self, run_id: str, batch: Batch) -> None:
        """Deliver one batch. Entries that are there already stay as they are."""
        from mlflow.entities import Metric, Param, RunTag

        with self.translated():
            self.client.log_batch(
                run_id,
                metrics=[
                    Metric(key, value, timestamp, step) for key, value, timestamp, step in batch.metrics
                ],
                params=[Param(key, value) for key, value in batch.params],
                tags=[RunTag(key, value) for key, value in batch.tags],
            )

    def set_state(self, run_id: str, state: str, *, end_ms: int) -> None:
        """Show the run's state, in MLflow's words and, as the tag ``shoal.state``, in ours."""
        with self.translated():
            self.client.set_tag(run_id, "shoal.state", state)
            status = _STATUS[state]
            if status == "RUNNING":
                self.client.update_run(run_id, status=status)
            else:
                self.client.set_terminated(run_id, status=status, end_time=end_ms)

    def log_text(self, run_id: str, text: str, path: str) -> bool:
        """Keep ``text`` as an artifact; False where the server keeps them in a folder of its own machine."""
        with self.translated():
            where = self.client.get_run(run_id).info.artifact_uri
            if self._is_server and urlsplit(where).scheme in ("", "file"):
                return False  # MLflow would write that path on *this* machine
            self.client.log_text(run_id, text, path)
            return True

    def _ensure_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            slug = re.sub(r"[^\w.-]", "_", name)
            location = None if self._is_server else (self._artifacts_dir / slug).as_uri()
            try:
                return str(self.client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self.client.get_experiment_by_name(name)
        if experiment.lifecycle_stage != "active":
            self.client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def all_pages(self, search: Callable[..., Any], filter_string: str | None = None) -> list[Any]:
        """Every result of one of MLflow's searches for models or versions."""
        found: list[Any] = []
        token = None
        with self.translated():
            while True:
                page = search(filter_string=filter_string, max_results=_PAGE, page_token=token)
                found += page
                token = page.token
                if not token:
                    return found

    def _trouble(self, message: str) -> TrackingError:
        check = "is the server up, and is `tracking:` in cluster.yaml its URL?"
        if not self._is_server:
            check = "is the disk full, or the file held by another process?"
        return TrackingError(f"tracking at {self.uri} does not answer: {_gist(message)} ({check})")


def _make_database(path: Path) -> None:
    """An empty file that only we may read, which SQLite takes for a new database: its own others may read."""
    try:
        make_directories(path.parent)
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
    except OSError as error:
        raise storage_error("open the tracking database", path, error) from error


def without_credentials(uri: str) -> str:
    """``uri`` without user and password, for messages."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _cannot_hold(error: BaseException | None) -> bool:
    """Whether what was sent is to blame: text or a number that cannot be stored, for all that the store answers.

    MLflow and sqlalchemy wrap such an error, so its causes are looked at too. What ``requests`` raises, and an
    answer that is no JSON, are of the server, though some of them are ValueErrors.
    """
    while error is not None and not isinstance(error, OSError | json.JSONDecodeError):
        if isinstance(error, ValueError | OverflowError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _without_secret(text: str, raw_uri: str, shown_uri: str) -> str:
    text = text.replace(raw_uri, shown_uri)
    if (secret := re.search(r"//([^/@]+)@", raw_uri)) is not None:
        text = text.replace(secret.group(1), "***")
    return text


def _gist(message: str) -> str:
    """What went wrong, in a line: the system's words where there are any, such as ``Connection refused``."""
    if (system := re.search(r"\[Errno -?\d+\] ([^'\")\n]+)", message)) is not None:
        return system.group(1)
    return next(iter(message.strip().splitlines()), "no reason given")[:500]
