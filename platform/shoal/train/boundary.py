"""What a run does between its steps: metrics, evaluation, checkpoints, wishes to stop or resize, its last line."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import PeerLost, RecipeError, ShoalError, StorageError, SupersededError
from shoal.recipe import Recipe
from shoal.storage import Token, collect_orphans, is_full
from shoal.tracking import RunState
from shoal.train.bad_steps import BadSteps, BeginAgain
from shoal.train.cadence import Cadence
from shoal.train.checkpoint_writer import CheckpointWriter
from shoal.train.checkpoints import Snapshot, give_parts, is_large, take_snapshot, tensors_of, write_snapshot
from shoal.train.group import Group
from shoal.train.out_of_memory import is_out_of_memory, write_micro_batch
from shoal.train.patient_record import PatientRecord
from shoal.train.pulse import heart
from shoal.train.quarantine import BadSample, record_bad_sample
from shoal.train.reduce import Wishes
from shoal.train.resume import Beginning, facts, record_checkpoint
from shoal.train.session import Session
from shoal.train.spec import EvalListener, RunSpec, digest_of
from shoal.train.staging import Staging
from shoal.train.stamp import checkpoint_at

if TYPE_CHECKING:
    from torch.utils.data import Dataset

WRITE_SLICE_S = 5.0
"""How long rank 0 waits for a checkpoint to be written before it tells its peers that it still does."""

logger = logging.getLogger(__name__)


class RunBoundary:
    """The `session.Boundary` of a run that keeps a record; rank 0 writes it. `begin` before the first step."""

    def __init__(
        self, spec: RunSpec, group: Group, record: PatientRecord, token: Token, on_eval: EvalListener | None
    ) -> None:
        self._spec, self._group, self._record, self._on_eval = spec, group, record, on_eval
        self._token = token
        self._objective = spec.recipe.objective
        self._cadence = Cadence(target_steps=spec.target_steps, checkpoint_every_s=spec.checkpoint_every_s)
        self._best: dict[int, float] = {}
        """The best by the objective and their steps, as many as are kept for that; the same on every rank."""
        self._saved_step: int | None = None
        self._evaluated: tuple[int, dict[str, float]] = (0, {})
        self._stop = False
        self._resize_to: int | None = None
        """What is ordered, on rank 0."""
        self._leaves_for: int | None = None
        """What is on its way, on rank 0: this attempt is over."""
        self._cannot_leave = False
        self._has_stepped = False
        self._run = digest_of(record.identity())
        self._bad_steps = BadSteps(record.dir)
        self._writer = (
            CheckpointWriter(
                record.checkpoints_dir,
                keep=spec.keep,
                keep_best=spec.keep_best,
                objective=self._objective,
                token=token,
                on_commit=self._committed,
                on_failure=self._not_committed,
            )
            if group.is_first
            else None
        )
        self._is_prepared = False
        self._staging = Staging() if group.is_first else None
        # Nothing changes parameters between two steps of the default loop; a loop of the user's own may.
        self._may_overlap = type(spec.recipe).train is Recipe.train

    def begin(self, beginning: Beginning) -> None:
        """Know what is on disk already: nothing is saved twice, and only a better model is the best.

        Deletes what an attempt that died left there.
        """
        self._saved_step = beginning.saved_step
        self._bad_steps.know(beginning.bad_steps)
        self._best = dict(beginning.best)
        if self._writer is not None:
            self._writer.know(beginning.best)
            self._delete_leftovers(self._writer)

    def _delete_leftovers(self, writer: CheckpointWriter) -> None:
        try:
            for folder in (self._record.dir, self._record.dir / "fence"):
                collect_orphans(folder)
            if self._saved_step is not None:
                writer.discard_old(self._saved_step)
        except StorageError:
            logger.warning("leftovers in %s stay until the next commit", self._record.dir, exc_info=True)

    def catch_up(self, session: Session, beginning: Beginning) -> None:
        """Measure what is due at the step that the run goes on from: who was lost meanwhile may have prevented it."""
        path = beginning.unmeasured
        if path is None or not self._is_look_due(session):
            return
        values = self._evaluate(session)
        self._is_among_best(session, values)
        if self._writer is not None:
            record_checkpoint(self._record, path, values)
            self._writer.know({session.steps_done: values[self._objective.metric]})
        if self._group.is_first and self._on_eval is not None:
            self._on_eval(session.steps_done, values)

    def wishes(self) -> Wishes:
        if self._group.is_first and not self._stop and self._cadence.is_look_due():
            self._cadence.looked()
            self._token.check()
            self._stop = self._record.stop_requested()
            self._resize_to = self._record.resizing.ordered(self._record.attempt)
        is_free = self._writer is not None and not self._writer.is_writing
        return Wishes(
            checkpoint=is_free and self._cadence.is_checkpoint_due(),
            stop=self._stop,
            resize=self._resize_to is not None
            and (not self._cannot_leave or self._cadence.is_checkpoint_due()),
        )

    def before_update(self) -> None:
        if self._writer is not None:
            self._writer.finish_copying()

    def after_step(self, session: Session, wishes: Wishes) -> bool:
        self._cadence.step_ended()
        try:
            return self._at_boundary(session, wishes)
        finally:
            self._cadence.step_begins(is_writing=self._writer is not None and self._writer.is_writing)

    def _at_boundary(self, session: Session, wishes: Wishes) -> bool:
        is_last = session.steps_done >= self._spec.target_steps
        is_end = is_last or wishes.stop
        if not self._has_stepped:
            self._has_stepped = True
            if self._group.is_first:
                self._record.note("first_step", step=session.steps_done)
        self._write_metrics(session, force=is_end or wishes.resize)
        values: dict[str, float] = {}
        if self._is_look_due(session):
            values = self._evaluate(session)
            self._evaluated = session.steps_done, values
        is_best = self._is_among_best(session, values)
        is_wished = wishes.checkpoint or wishes.stop or wishes.resize
        if is_wished or is_last or is_best or (values and self._spec.checkpoint_at_eval):
            self._save(session, values, is_awaited=is_end or wishes.resize or self._spec.checkpoint_at_eval)
        self._prepare(session)
        if values and self._spec.checkpoint_at_eval:
            self._wait_written()  # whoever is told may copy it
        if values and self._group.is_first and self._on_eval is not None:
            self._on_eval(session.steps_done, values)  # last: it may take its time, or raise
        return is_end or (wishes.resize and self._is_committed(session))

    def bad_sample(self, bad: BadSample) -> None:
        self._token.check()
        try:
            if not record_bad_sample(self._record.dir, bad):
                return
        except StorageError as err:
            if not is_full(err):
                raise
            self._record.is_full("quarantine", f"the sample {bad.sample} is not noted: {err}")
        message = (
            f"the sample {bad.sample} could not be loaded {bad.tries} time(s) ({bad.error}): from step {bad.step} on "
            "others take its place"
        )
        self._record.append(
            "quarantined", step=bad.step, sample=bad.sample, tries=bad.tries, error=bad.error, message=message
        )

    def bad_step(self, step: int, samples: list[int], reason: str) -> None:
        self._bad_steps.add(step, samples=samples, reason=reason)
        is_rollback = self._spec.on_nan == "rollback"
        if self._group.is_first:
            self._token.check()
            self._write_bad_steps(is_needed=is_rollback)  # before anything is saved without it
            then = "the run goes back to its last checkpoint, and " if is_rollback else ""
            self._record.append(
                "bad_step",
                step=step,
                reason=reason,
                num_samples=len(samples),
                action=self._spec.on_nan,
                message=f"step {step}: {reason}; {then}its {len(samples)} samples are left out",
            )
        if is_rollback:
            raise BeginAgain

    def out_of_memory(self, session: Session, error: Exception | None) -> None:
        """Have the run go on with fewer samples at a time; ``error`` is this rank's, None where a peer ran out.

        Every rank calls it in the same step, or one that could not tell the others: those lose it as a peer.

        Raises:
            RecipeError: they cannot be fewer.
            PeerLost: that one is this one.
        """
        step, samples = session.steps_done, session.smaller_micro_batch
        if self._spec.shards is not None:
            raise RecipeError(
                f"step {step}: out of memory ({error}). The shards of an exact run have a fixed size, here "
                f"{session.micro_batch} samples at most: start another run with more of them (shards="
                f"{2 * self._spec.shards}), a smaller batch_size, or without exact"
            ) from error
        if samples is None:
            raise RecipeError(
                f"step {step}: out of memory with {session.micro_batch} sample(s) at a time, which cannot be fewer "
                f"({error or 'on another worker'}). Make the model or the samples smaller"
            ) from error
        is_known = error is None or session.give_up_step()
        if self._group.is_first or not is_known:
            self._token.check()
            write_micro_batch(self._record.dir, samples)
            self._record.append(
                "out_of_memory",
                step=step,
                samples=samples,
                message=f"step {step} did not fit into memory with {session.micro_batch} samples at a time: from "
                f"here on they are {samples} at most; the batch stays {self._spec.recipe.batch_size}",
            )
        if self._group.size > 1 and not is_known:
            raise PeerLost(
                f"step {step}: out of memory ({error}), too late to tell the other workers"
            ) from error
        try:
            self.rescue(session)
        except Exception as err:
            if not is_out_of_memory(err):
                raise
        # Who begins anew takes a token, under which nobody else may still be writing.
        self._group.gather(None)

    def _prepare(self, session: Session) -> None:
        """After the first step, when the optimizer has a state: make ready for large snapshots."""
        if self._is_prepared:
            return
        self._is_prepared = True
        if self._writer is None or self._staging is None or self._writer.is_writing or session.is_divided:
            return
        files = tensors_of(session.model, session.optimizer, session.scheduler)
        if is_large(files):
            self._writer.prepare(self._staging, files)

    @heart.during("save")
    def finish(self, session: Session) -> None:
        """Write what is left and the attempt's last line."""
        if session.steps_done >= self._spec.target_steps and session.data.test is not None:
            self._measure(session, "test", session.data.test)
        if session.steps_done != self._saved_step:
            self._save(session, {}, is_awaited=True)  # a loop of the user's own that left early
        self._wait_written()
        if self._writer is not None:
            self._close_writer(self._writer, session.steps_done)
        self._group.share(None)  # nobody leaves before the last line is written

    def _close_writer(self, writer: CheckpointWriter, step: int) -> None:
        """End the attempt; where there was no room for the last checkpoint, as failed: to start again makes none."""
        try:
            writer.close()
        except StorageError as err:
            if not is_full(err):
                raise
            failure = StorageError(
                f"the run is at step {step}, and its last checkpoint could not be saved: {err} The same command goes "
                "on from the checkpoint before it"
            )
            self._record.append_end(RunState.FAILED, step=step, failure=failure)
        else:
            self._write_last_line(step)

    def _write_last_line(self, step: int) -> None:
        if step >= self._spec.target_steps:
            self._record.append_end(RunState.FINISHED, step=step)
        elif self._leaves_for is not None:
            self._record.append("resize", step=step, **{"from": self._group.size, "to": self._leaves_for})
        else:
            self._record.append_end(RunState.STOPPED, step=step)

    @heart.during("save")
    def rescue(self, session: Session) -> None:
        """After a peer was lost: commit the last step boundary, which every survivor has, so that no step is lost.

        Every survivor tries; one commits. What it cannot commit is left to the last checkpoint, and said. The line
        in the record is written by whoever goes on from it. Of a divided model nobody has the whole any more.
        """
        self.close()
        if session.is_divided or not session.can_rewind:
            return
        session.rewind()
        step, values = self._evaluated
        if session.steps_done == 0 or self._is_there(session) or self._record.state() == RunState.FINISHED:
            return
        try:
            self._bad_steps.write()  # rank 0 may have died before it did
            snap = self._snapshot(session, values if step == session.steps_done else {})
            write_snapshot(self._record.checkpoints_dir, snap)
        except (StorageError, RecipeError) as err:
            if not self._is_there(session):  # else another survivor was faster
                message = f"the step that was interrupted will be repeated: {err}"
                self._record.append("warning", message=message)

    def close(self) -> None:
        """Wait for a checkpoint that is being written: the lock must outlive it. Nothing is staged after this."""
        if self._writer is not None:
            self._writer.end()
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def _is_look_due(self, session: Session) -> bool:
        step = session.steps_done
        return step >= self._spec.target_steps or step % self._spec.recipe.eval_every == 0

    def _evaluate(self, session: Session) -> dict[str, float]:
        values = self._measure(session, "val", session.data.val)
        if self._objective.metric not in values:
            raise RecipeError(
                f"the objective is the {self._objective}, but metrics() gave {', '.join(sorted(values))}"
            )
        return values

    def _measure(self, session: Session, split: str, dataset: Dataset[Any]) -> dict[str, float]:
        """Mean loss and metrics over a data set, recorded. Blocks; the same on every rank."""
        began = time.monotonic()
        values = session.evaluate(dataset)
        if self._group.is_first:
            seconds = time.monotonic() - began
            self._record.append(
                "eval", step=session.steps_done, split=split, values=values, seconds=round(seconds, 6)
            )
        return values

    def _is_among_best(self, session: Session, values: dict[str, float]) -> bool:
        """Whether a checkpoint of this step is one of those that are kept for their values."""
        value = values.get(self._objective.metric)
        if value is None:
            return False
        self._best = self._objective.best({**self._best, session.steps_done: value}, self._spec.keep_best)
        return session.steps_done in self._best

    @heart.during("save")
    def _save(self, session: Session, values: dict[str, float], *, is_awaited: bool) -> None:
        if session.steps_done == self._saved_step:
            return
        self._saved_step = session.steps_done
        self._cadence.checkpoint_begins()
        began = time.monotonic()
        self._wait_written()
        if self._writer is not None:
            snap = self._snapshot(session, values)
            if not self._bad_steps.is_written:
                self._write_bad_steps(is_needed=False)
            snap.pause_s = time.monotonic() - began
            self._writer.submit(snap, is_awaited=is_awaited)
            self._cadence.checkpoint_taken()
        elif session.is_divided:
            give_parts(session.model, session.optimizer, session.scheduler)

    def _snapshot(self, session: Session, values: dict[str, float]) -> Snapshot:
        return take_snapshot(
            step=session.steps_done,
            model=session.model,
            optimizer=session.optimizer,
            scheduler=session.scheduler,
            facts=facts(self._spec, self._group),
            run=self._run,
            values=values,
            token=self._token,
            # Of a divided model whole tensors are made one by one.
            staging=None if session.is_divided else self._staging,
            may_overlap=self._may_overlap,
        )

    def _is_there(self, session: Session) -> bool:
        """Whether this very boundary is committed already."""
        return checkpoint_at(self._record, session.steps_done) is not None

    @heart.during("save")
    def _wait_written(self) -> None:
        """Wait on every rank until nothing is being written.

        In slices: a disk may need longer for a checkpoint than a rank waits for its peers in one collective.
        """
        while not self._group.share(self._writer is None or self._writer.join(timeout_s=WRITE_SLICE_S)):
            if self._writer is not None:
                self._writer.hurry()

    def _is_committed(self, session: Session) -> bool:
        """Whether this boundary is on the disk, so that another number of workers can go on from here; waits for it.

        If it is not (the disk is full, say), these go on, and try again when the next checkpoint is due.
        """
        self._wait_written()
        self._cannot_leave = not self._group.share(self._is_there(session))
        if not self._cannot_leave:
            self._leaves_for = self._resize_to
        return not self._cannot_leave

    def _write_metrics(self, session: Session, *, force: bool) -> None:
        if not (self._group.is_first and (force or self._cadence.is_line_due(session.steps_done))):
            return
        self._cadence.line_written()
        values = session.take_progress()
        if values is not None:
            self._record.append("metrics", step=session.steps_done, values=values)

    def _committed(self, snap: Snapshot, path: Path, size_bytes: int, seconds: float) -> None:
        self._record.append(
            "checkpoint",
            step=snap.step,
            path=str(path.relative_to(self._record.dir)),
            size_bytes=size_bytes,
            seconds=seconds,
            pause_s=round(snap.pause_s, 6),
            values=snap.values,
        )
        self._record.has_room("checkpoints")

    def _not_committed(self, snap: Snapshot, err: ShoalError) -> None:
        if isinstance(err, SupersededError):
            return  # the record is somebody else's; `wishes` and `finish` raise it
        if isinstance(err, RecipeError):
            return  # ends the run, in `before_update` or at its end
        if snap.staged is not None and snap.staged.copying.is_torn:
            self._may_overlap = False
        message = f"no checkpoint at step {snap.step}: {err} Training goes on; earlier checkpoints are kept"
        if is_full(err):
            self._record.is_full("checkpoints", f"{message}, and the next is tried when it is due")
        else:
            self._record.append("warning", message=message)

    def _write_bad_steps(self, *, is_needed: bool) -> None:
        """Where the disk is full and the list is not needed yet, it waits for the next checkpoint."""
        try:
            self._bad_steps.write()
        except StorageError as err:
            if is_needed or not is_full(err):
                raise
            self._record.is_full("bad_steps.json", f"what was left out is not listed: {err}")
        else:
            self._record.has_room("bad_steps.json")
