"""``shoal train --detach``: a Ray job on the cluster drives the run, so that it outlives this shell."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from shoal.cli.console import say, show_facts
from shoal.cli.project import connect
from shoal.errors import ClusterError, DeadlineExceeded, EnvironmentFailure, from_name

if TYPE_CHECKING:
    from shoal.recipe import Recipe
    from shoal.tracking import RunRecord
    from shoal.train.options import RunOptions

START_DEADLINE_S = 180.0
"""A job's driver starts Python, Ray and the workers: some 10 s, several times that on a busy machine, and the
run may wait for room as long as a run does."""
_POLL_S = 0.2


def train_detached(recipe: Recipe, words: Sequence[str], options: RunOptions) -> None:
    """Have the cluster train, and return once the run has started; ``words`` are the fields as typed.

    Raises:
        RequestError: no cluster runs, or the run cannot be as asked; nothing was submitted.
        RecipeError, EnvironmentFailure: the run did not start; says why.
    """
    from shoal.train.driver import finished_run, prepare

    cluster = connect()
    spec = cluster.plan(recipe, options)
    record = prepare(spec)
    finished = finished_run(spec, record)
    if finished is not None:
        say(finished.note)
        return
    attempt = record.attempt
    # As resolved here: an alias that moves meanwhile would make it another run.
    options = replace(options, name=spec.name, init_from=spec.init_from_name)
    command = entrypoint(recipe, words, options, str(cluster.info.project))
    job = _Job.submit(cluster.info.dashboard_url, command, spec.name)
    _wait_started(record, job, attempt)
    show_facts(
        {
            "run": spec.name,
            "state": f"{record.state()}, driven by job {job.id}",
            "follow": f"shoal logs {spec.name} -f",
            "look": f"shoal runs {spec.name}",
            "stop": f"shoal stop {spec.name}",
        }
    )


def entrypoint(recipe: Recipe, words: Sequence[str], options: RunOptions, project: str) -> str:
    """The shell command of the job; the cluster has project and shoal on its path, so nothing is uploaded.

    The fields go as they were typed: a value such as None or a tuple has no text that reads back as itself.
    """
    from shoal.recipe import recipe_ref

    command = [sys.executable, "-m", "shoal.cli", "train", recipe_ref(recipe), *words, *_words(options)]
    # exec: SIGTERM, with which a job is stopped, reaches Python and not a shell that ignores it.
    return f"cd {shlex.quote(project)} && exec {shlex.join(command)}"


def _words(options: RunOptions) -> list[str]:
    """As options of ``shoal train``; they came from there, so their values read back as they are."""
    return [
        _word(field.name.replace("_", "-"), value)
        for field in fields(options)
        if (value := getattr(options, field.name)) != field.default
    ]


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


class _Job:
    """One Ray job."""

    def __init__(self, client: Any, job_id: str) -> None:
        self._client = client
        self.id = job_id

    @classmethod
    def submit(cls, dashboard_url: str, command: str, run: str) -> _Job:
        from ray.job_submission import JobSubmissionClient

        try:
            client = JobSubmissionClient(dashboard_url)
            return cls(client, client.submit_job(entrypoint=command, metadata={"shoal_run": run}))
        except (RuntimeError, ConnectionError, OSError) as err:
            raise ClusterError(f"the cluster at {dashboard_url} did not take the job: {err}") from err

    def is_over(self) -> bool:
        """Whether its driver has ended, whichever way."""
        return bool(self._client.get_job_status(self.id).is_terminal())

    def last_words(self) -> str:
        """The end of what its driver printed."""
        return str(self._client.get_job_logs(self.id))[-3000:].strip()


def _wait_started(record: RunRecord, job: _Job, attempt: int) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while record.attempt <= attempt:
        if job.is_over():
            raise _failure(record, job)
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"run {record.name!r} has not started within {START_DEADLINE_S:.0f} s and goes on trying. "
                f"See: shoal status, and the job's log: ray job logs {job.id}"
            )
        time.sleep(_POLL_S)


def _failure(record: RunRecord, job: _Job) -> Exception:
    end = record.summary().ended
    if end is not None and end["state"] == "failed" and end["traceback"]:
        message = f"run {record.name!r} failed: {end['error']}"
        return from_name(str(end.get("error_type")), message, traceback_text=str(end["traceback"]))
    words = job.last_words().removeprefix("error: ")
    return EnvironmentFailure(f"run {record.name!r} did not start. Job {job.id} said:\n{words}")
