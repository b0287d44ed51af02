"""One worker's part of one run, from its first line in the record to its last. No Ray here."""

from __future__ import annotations

import os
import platform
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from shoal.errors import (
    ClusterError,
    DeadlineExceeded,
    EnvironmentFailure,
    IdentityError,
    RecipeError,
    ShoalError,
)
from shoal.models import ModelPackage, load_tensors
from shoal.recipe import Datasets, recipe_ref
from shoal.storage import FileLock, create_json, read_json
from shoal.tracking import RunRecord
from shoal.train.checkpoints import (
    CheckpointWriter,
    Loaded,
    Snapshot,
    find_checkpoint,
    read_checkpoint,
    take_snapshot,
)
from shoal.train.fingerprint import fingerprint
from shoal.train.group import Group, PeerLost
from shoal.train.inherit import under_new_fields
from shoal.train.seeds import capture_random_state, derive_seed, restore_random_state, seed_everything
from shoal.train.session import Session
from shoal.train.spec import RunSpec

LOCK_TIMEOUT_S = 20.0
"""How long a new rank 0 waits for the one before it to be gone for certain."""
STOP_POLL_S = 0.25
"""How often rank 0 looks whether someone asked the run to stop."""
NUM_METRIC_LINES = 200
"""About how many lines of training metrics a run writes."""
MAX_METRIC_GAP_S = 2.0
"""The longest the record stays silent between steps that are shorter than that."""


EvalListener = Callable[[int, Mapping[str, float]], None]
"""Told on rank 0 of every look at the validation data: (step, values)."""


def train_worker(spec: RunSpec, group: Group, *, on_eval: EvalListener | None = None) -> None:
    """Take this worker's part in the run until it ends. Blocks.

    Whatever the recipe raises ends the run: it is recorded and *not* raised, because raising is how a worker
    asks to be started again. The record's last line tells how it ended.

    Raises:
        EnvironmentFailure: the machines failed (a lost peer, full storage); starting again may help.
    """
    record = RunRecord(spec.storage, spec.name)
    begin = record.end_offset
    with _HeldRun(record, group):
        try:
            _train(spec, group, record, on_eval)
        except PeerLost:
            group.leave()
            if not _has_ended(record, begin):
                raise  # else the peer left because the run is over, done or failed, and has said so
        except EnvironmentFailure:
            group.leave()
            raise
        except Exception as err:
            # BaseExceptions (Ray's SystemExit on kill) pass: they are not the recipe's.
            record.append(
                "end",
                step=record.step,
                state="failed",
                error=_describe(err),
                error_type=type(err).__name__ if isinstance(err, ShoalError) else "RecipeError",
                traceback=_traceback(err),
            )
            group.leave()


def _train(spec: RunSpec, group: Group, record: RunRecord, on_eval: EvalListener | None) -> None:
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    seed_everything(derive_seed(spec.seed, "data"))  # a random split must be the same one on every worker
    data = spec.recipe.build_data()
    keeper = _Keeper(spec, group, record, on_eval)
    session = Session(
        spec.recipe,
        data,
        group,
        keeper,
        seed=spec.seed,
        target_steps=spec.target_steps,
        precision=spec.precision,
    )
    _check_data(record, data, group)
    source = keeper.restore(session)
    pids = group.gather(os.getpid())
    if group.is_first:
        _warn_of_changed_code(record, spec)
        record.append(
            "start",
            workers=group.size,
            pids=pids,
            host=socket.gethostname(),
            step=session.steps_done,
            target_steps=spec.target_steps,
            source=source,
            revision=spec.revision,
        )
    try:
        spec.recipe.train(session)
        keeper.finish(session)
    finally:
        session.close()
        keeper.close()


class _HeldRun:
    """The run's lock, held by rank 0 while it trains; the others wait for it to be taken."""

    def __init__(self, record: RunRecord, group: Group) -> None:
        self._record, self._group = record, group
        self._lock = FileLock(record.lock_path)

    def __enter__(self) -> None:
        problem = None
        if self._group.is_first:
            try:
                self._lock.acquire(timeout_s=LOCK_TIMEOUT_S)
            except DeadlineExceeded as err:
                problem = ClusterError(
                    f"run {self._record.name!r} is already being trained ({err}); wait for it, follow it with "
                    f"`shoal logs {self._record.name} -f`, or stop it with `shoal stop {self._record.name}`"
                )
        problem = self._group.share(problem)
        if problem is not None:
            raise problem

    def __exit__(self, *exc: object) -> None:
        if self._group.is_first:
            self._lock.release()


class _Keeper:
    """What happens at step boundaries: metrics, evaluation, checkpoints, the wish to stop."""

    def __init__(self, spec: RunSpec, group: Group, record: RunRecord, on_eval: EvalListener | None) -> None:
        self._spec, self._group, self._record, self._on_eval = spec, group, record, on_eval
        self._objective = spec.recipe.objective
        self._best: float | None = None
        self._saved_step = -1
        self._last_checkpoint = self._last_look = self._last_line = time.monotonic()
        self._stop = False
        self._writer = (
            CheckpointWriter(
                record.checkpoints_dir,
                keep=spec.keep,
                objective=self._objective,
                on_commit=self._committed,
                on_failure=self._not_committed,
            )
            if group.is_first
            else None
        )

    def restore(self, session: Session) -> str:
        """Go on from the newest checkpoint that verifies, on every rank; returns where the weights came from."""
        path: Path | None = None
        if self._group.is_first:
            path = find_checkpoint(self._record.checkpoints_dir, self._rejected)
        path, self._best = self._group.share((path, self._best_recorded()))
        if path is not None:
            loaded = read_checkpoint(path)
            # Its own checkpoints come later; until there is one, every attempt begins from the source's.
            source = (
                self._spec.source if self._spec.source and self._spec.source.step == loaded.step else None
            )
            self._load(session, loaded if source is None else under_new_fields(loaded, session, self._spec))
            return "checkpoint" if source is None else "adopted"
        if self._spec.source is not None:
            raise RecipeError(
                f"the copy of step {self._spec.source.step} of run {self._spec.source.run!r}, from which this run "
                f"was to go on, is gone from {self._record.checkpoints_dir} or damaged; start another run"
            )
        if self._spec.init_from is not None:
            _load_weights(session, self._spec.init_from, expect=self._spec.init_from_name)
            return "init_from"
        return "fresh"

    def wants_checkpoint(self) -> bool:
        if self._writer is None:
            return False
        return time.monotonic() - self._last_checkpoint >= self._spec.checkpoint_every_s

    def wants_stop(self) -> bool:
        now = time.monotonic()
        if self._group.is_first and not self._stop and now - self._last_look >= STOP_POLL_S:
            self._last_look = now
            self._stop = self._record.stop_requested()
        return self._stop

    def after_step(self, session: Session, *, checkpoint: bool, stop: bool) -> bool:
        is_last = session.steps_done >= self._spec.target_steps
        self._write_metrics(session, force=is_last or stop)
        values: dict[str, float] = {}
        if is_last or session.steps_done % self._spec.recipe.eval_every == 0:
            values = self._evaluate(session)
        is_best = self._is_new_best(values)
        if checkpoint or stop or is_last or is_best or (values and self._spec.checkpoint_at_eval):
            self._save(session, values)
        if values and self._group.is_first and self._on_eval is not None:
            if self._spec.checkpoint_at_eval and self._writer is not None:
                self._writer.join()  # whoever is told may copy it
            self._on_eval(session.steps_done, values)  # last: it may take its time, or raise
        return is_last or stop

    def finish(self, session: Session) -> None:
        """Write what is left and the run's last line."""
        if session.steps_done >= self._spec.target_steps and session.data.test is not None:
            test = session.evaluate(session.data.test)
            if self._group.is_first:
                self._record.append("eval", step=session.steps_done, split="test", values=test)
        if session.steps_done != self._saved_step:
            self._save(session, {})  # a loop of the user's own that left early
        if self._writer is not None:
            self._writer.close()
            state = "finished" if session.steps_done >= self._spec.target_steps else "stopped"
            self._record.append("end", step=session.steps_done, state=state, error="", traceback="")
        self._group.share(None)  # nobody leaves before the last line is written

    def close(self) -> None:
        """Wait for a checkpoint that is being written: the lock must outlive it."""
        if self._writer is not None:
            self._writer.join()

    def _load(self, session: Session, loaded: Loaded) -> None:
        try:
            session.model.load_state_dict(loaded.model)
            session.optimizer.load_state_dict(loaded.optimizer)
            if session.scheduler is not None and loaded.scheduler is not None:
                session.scheduler.load_state_dict(loaded.scheduler)
        except (RuntimeError, ValueError, KeyError) as err:
            raise RecipeError(
                f"the checkpoint of step {loaded.step} does not fit the recipe as it is now: {err}. "
                + (
                    f"It is of run {self._spec.source.run!r}, whose fields are others: population-based training "
                    "can search only fields that leave the model's shape alone; fix those that do not"
                    if self._spec.source is not None
                    else "The model's code changed; undo that, or start another run with a name of its own"
                )
            ) from err
        session.steps_done = self._saved_step = loaded.step
        if len(loaded.random_states) == self._group.size:
            restore_random_state(loaded.random_states[self._group.rank])
        else:
            session.seed_for_workers(loaded.step)
        if self._group.is_first:
            for name, was in loaded.facts.items():
                now = _facts(self._spec, self._group)[name]
                if now != was:
                    self._warn(
                        f"{name} was {was} in the checkpoint and is {now} now; the last bits may differ"
                    )

    def _evaluate(self, session: Session) -> dict[str, float]:
        values = session.evaluate(session.data.val)
        if self._objective.metric not in values:
            raise RecipeError(
                f"the objective is the {self._objective}, but metrics() gave {', '.join(sorted(values))}"
            )
        if self._group.is_first:
            self._record.append("eval", step=session.steps_done, split="val", values=values)
        return values

    def _is_new_best(self, values: dict[str, float]) -> bool:
        value = values.get(self._objective.metric)
        if value is None or not self._objective.is_better(value, self._best):
            return False
        self._best = value
        return True

    def _save(self, session: Session, values: dict[str, float]) -> None:
        if session.steps_done == self._saved_step:
            return
        self._saved_step = session.steps_done
        random_states = self._group.gather(capture_random_state())
        if self._writer is not None:
            self._writer.submit(
                take_snapshot(
                    step=session.steps_done,
                    model=session.model,
                    optimizer=session.optimizer,
                    scheduler=session.scheduler,
                    random_states=random_states,
                    facts=_facts(self._spec, self._group),
                    values=values,
                )
            )
            self._last_checkpoint = time.monotonic()

    def _write_metrics(self, session: Session, *, force: bool) -> None:
        if not self._group.is_first:
            return
        every = max(1, self._spec.target_steps // NUM_METRIC_LINES)
        now = time.monotonic()
        if not (force or session.steps_done % every == 0 or now - self._last_line > MAX_METRIC_GAP_S):
            return
        self._last_line = now
        values = session.take_progress()
        if values is not None:
            self._record.append("metrics", step=session.steps_done, values=values)

    def _best_recorded(self) -> float | None:
        if self._writer is None:
            return None
        best = self._record.best_checkpoint(self._objective.metric, self._objective.mode)
        if best is None:
            return None
        value = float(best["values"][self._objective.metric])
        self._writer.know_best(int(best["step"]), value)
        return value

    def _committed(self, snap: Snapshot, path: Path, size_bytes: int, seconds: float) -> None:
        self._record.append(
            "checkpoint",
            step=snap.step,
            path=str(path.relative_to(self._record.dir)),
            size_bytes=size_bytes,
            seconds=seconds,
            values=snap.values,
        )

    def _not_committed(self, snap: Snapshot, err: ShoalError) -> None:
        self._warn(
            f"no checkpoint at step {snap.step}: {err}. Training goes on; earlier checkpoints are kept"
        )

    def _rejected(self, path: Path, reason: str) -> None:
        self._record.append("rejected", path=str(path.relative_to(self._record.dir)), reason=reason)

    def _warn(self, message: str) -> None:
        self._record.append("warning", message=message)


def _check_data(record: RunRecord, data: Datasets, group: Group) -> None:
    """Refuse data that differs between workers, or from what the run was trained on before."""
    prints = group.gather(fingerprint(data))
    if len(set(prints)) > 1:
        raise RecipeError(
            f"build_data gave different data on different workers (fingerprints {', '.join(prints)}); "
            "it must give the same on every call: fix its seeds"
        )
    if not group.is_first:
        return
    found = {"fingerprint": prints[0]}
    path = record.dir / "data.json"
    if not create_json(path, found) and (was := read_json(path)) != found:
        raise IdentityError(
            f"run {record.name!r} was trained on other data (fingerprint {was['fingerprint']}, now "
            f"{found['fingerprint']}); restore that data, or start another run with name=..."
        )


def _warn_of_changed_code(record: RunRecord, spec: RunSpec) -> None:
    last = record.events(("start",))[-1:]
    was = last[0].get("revision", "") if last else ""
    if was and spec.revision and was != spec.revision:
        record.append(
            "warning", message=f"the code changed since the last attempt: {was}, now {spec.revision}"
        )


def _load_weights(session: Session, package: Path, *, expect: str | None) -> None:
    ModelPackage.open(package, expect=expect)
    try:
        session.model.load_state_dict(load_tensors(package / "model.safetensors"))
    except RuntimeError as err:
        raise RecipeError(
            f"init_from: the weights in {package} do not fit this recipe's model: {err}"
        ) from err


def _facts(spec: RunSpec, group: Group) -> dict[str, Any]:
    return {
        "recipe": recipe_ref(spec.recipe),
        "workers": group.size,
        "device": group.device.type,
        "threads": torch.get_num_threads(),
        "precision": spec.precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _has_ended(record: RunRecord, begin: int, *, timeout_s: float = 2.0) -> bool:
    """True if a worker has recorded the end of this attempt; it may be a moment behind us."""
    deadline = time.monotonic() + timeout_s
    while True:
        if record.events(("end",), since=begin):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def _describe(err: Exception) -> str:
    return str(err) if isinstance(err, ShoalError) else f"{type(err).__name__}: {err}"


def _traceback(err: Exception) -> str:
    return (
        "" if isinstance(err, ShoalError) and not err.__cause__ else "".join(traceback.format_exception(err))
    )
