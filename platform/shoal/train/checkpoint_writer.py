"""Checkpoints are written beside the training, and those that are not kept are deleted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from shoal.errors import RecipeError, ShoalError, StorageError
from shoal.recipe import Objective
from shoal.storage import Fence, Token, collect_orphans, discard, discard_unread, make_directories
from shoal.storage.background import BackgroundWriter, WriterLost
from shoal.train.checkpoints import Snapshot, write_snapshot, write_staged
from shoal.train.staging import Files, Staging
from shoal.train.stamp import checkpoint_folders, position_of, step_of

PATIENCE_S = 2.0
"""How long somebody waits for the process, which has a low priority, before the thread writes instead."""

logger = logging.getLogger(__name__)


def plan_discard(steps: Iterable[int], *, keep: int, best: Collection[int]) -> list[int]:
    """Which checkpoints to delete: all but the newest ``keep`` and the best ones."""
    ordered = sorted(steps, reverse=True)
    return [step for step in ordered[keep:] if step not in best]


class CheckpointWriter:
    """Writes snapshots of one run on a thread of its own, one at a time, and deletes what is not kept.

    A second `submit` waits for the first: snapshots never pile up. Call `close` to wait for the last one. A staged
    snapshot is completed by the thread and written by a process; where that dies, the thread writes.
    """

    def __init__(
        self,
        parent: Path,
        *,
        keep: int,
        keep_best: int,
        objective: Objective,
        token: Token,
        on_commit: Callable[[Snapshot, Path, int, float], None],
        on_failure: Callable[[Snapshot, ShoalError], None],
    ) -> None:
        self._parent = parent
        self._keep = keep
        self._keep_best = keep_best
        self._objective = objective
        self._token = token
        self._on_commit = on_commit
        self._on_failure = on_failure
        self._thread: threading.Thread | None = None
        self._failure: ShoalError | None = None
        self._copied: Snapshot | None = None
        """The one that may still be copied."""
        self._background: BackgroundWriter | None = None
        self._values: dict[int, float] = {}
        """The objective at the committed checkpoints where it was measured."""
        make_directories(parent)
        collect_orphans(parent)

    def know(self, values: Mapping[int, float]) -> None:
        """Tell of the objective at checkpoints that are committed already, by step."""
        self._values |= values

    def prepare(self, staging: Staging, files: Files) -> None:
        """Begin to make memory and process ready for snapshots of such a state, so that the first costs no more."""
        self.join()
        self._background = self._background or BackgroundWriter(staging.memory)
        self._thread = threading.Thread(
            target=self._prepare, args=(staging, files), name="shoal-checkpoint", daemon=True
        )
        self._thread.start()

    def _prepare(self, staging: Staging, files: Files) -> None:
        assert self._background is not None
        try:
            staging.prepare(files)
            self._background.start()
        except ShoalError:
            logger.warning("the first checkpoint will take longer", exc_info=True)  # and will say why

    def submit(self, snap: Snapshot, *, is_awaited: bool = False) -> None:
        """Begin to write ``snap``; waits first for the one before it.

        One that is awaited is written by the thread in any case: the process has a low priority.
        """
        self.join()
        self._copied = snap if snap.staged is not None else None
        self._thread = threading.Thread(
            target=self._write, args=(snap, is_awaited), name="shoal-checkpoint", daemon=True
        )
        self._thread.start()

    def finish_copying(self) -> None:
        """Have the snapshot copied, helping: what it is a copy of is about to change. Waits for no disk.

        Raises:
            RecipeError: the snapshot before this one held NaN or infinite parameters.
        """
        if self._copied is not None:
            assert self._copied.staged is not None
            self._copied.staged.copying.finish()
            self._copied = None
        if isinstance(self._failure, RecipeError):
            raise self._failure

    def close(self) -> None:
        """Wait until the last snapshot is committed.

        Raises:
            StorageError: that one could not be written.
            RecipeError: it held NaN or infinite parameters.
        """
        self.join()
        if self._failure is not None:
            raise self._failure

    def hurry(self) -> None:
        """Have the thread write, at the priority of this process, what the process is writing: somebody waits."""
        if self._background is not None and self.is_writing:
            self._background.kill()

    def end(self) -> None:
        """Wait for what is being written, and end the process that writes."""
        if not self.join(PATIENCE_S):
            self.hurry()
            self.join()
        if self._background is not None:
            self._background.close()

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is on its way to the disk."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is being written, for at most ``timeout_s``; True then. Errors are left to `close`."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.is_writing

    def _write(self, snap: Snapshot, is_awaited: bool) -> None:
        try:
            snap.complete()
            started = time.monotonic()
            path, size_bytes = self._commit(snap, is_awaited)
            value = snap.values.get(self._objective.metric)
            if value is not None:
                self._values[snap.step] = value
            self._on_commit(snap, path, size_bytes, time.monotonic() - started)
            self._failure = None
            self.discard_old(snap.step)
        except ShoalError as err:
            self._failure = err
            self._on_failure(snap, err)
        except Exception as err:  # a thread's exception would vanish: keep it for `close`
            self._failure = StorageError(
                f"writing the checkpoint of step {snap.step} failed: {type(err).__name__}: {err}"
            )
            self._on_failure(snap, self._failure)

    def _commit(self, snap: Snapshot, is_awaited: bool) -> tuple[Path, int]:
        if snap.staged is not None and not is_awaited:
            if self._background is None:
                self._background = BackgroundWriter(snap.staged.memory)
            try:
                return write_staged(self._parent, snap, self._background)
            except WriterLost as lost:
                logger.warning("step %d is written by the training process: %s", snap.step, lost)
                self._token.check()  # somebody may have gone on from it
                discard(snap.directory(self._parent))  # it may have died when all was done
        return write_snapshot(self._parent, snap)

    def discard_old(self, newest: int) -> None:
        """Delete what is not kept beside the checkpoint at step ``newest``.

        Steps beyond that one did not verify, or the run would have gone on from them: they must not push out what
        does verify. Nor must those that do not count, which somebody wrote who did not know of this attempt.

        Raises:
            SupersededError: somebody else has taken over the run, and decides.
            StorageError: one cannot be deleted.
        """
        self._token.check()
        collect_orphans(self._parent)  # of a process that died, ours or that of an attempt that did
        succession = Fence(self._token.fence).succession()
        reached = [path for path in checkpoint_folders(self._parent) if step_of(path) <= newest]
        counting = {step_of(path) for path in reached if succession.counts(*position_of(path))}
        self._values = {step: value for step, value in self._values.items() if step in counting}
        best = self._objective.best(self._values, self._keep_best)
        dropped = plan_discard(counting, keep=self._keep, best=best)
        for path in reached:
            if step_of(path) in dropped or not succession.counts(*position_of(path)):
                discard_unread(path)  # what somebody reads is left to the next time
