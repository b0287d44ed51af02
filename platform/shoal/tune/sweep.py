"""A sweep: a search over a recipe's fields, driven by a thread of the process that started it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from shoal.errors import ClusterError, DeadlineExceeded, NotFoundError, RecipeError, ShoalError
from shoal.recipe import Objective
from shoal.storage import Storage
from shoal.tune.record import SweepRecord, Trial, TrialState, best_trial
from shoal.tune.show import reporter, sweep_frame, sweep_html

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from shoal.tune.trials import Trials

logger = logging.getLogger(__name__)

_LOOK_S = 0.5


class Sweep:
    """A search over a recipe's fields: its trials, the best of them, how it goes.

    Comes from `start.start_sweep`, which drives it, or `open_sweep`, which only reads its record.
    """

    def __init__(self, record: SweepRecord, *, driver: SweepDriver | None = None, note: str = "") -> None:
        self._record = record
        self._driver = driver
        self._identity = record.identity()
        self.note = note
        """Anything the user should know about how the sweep was started; empty if nothing."""

    @property
    def name(self) -> str:
        """The sweep's name; its runs are called ``<name>-t001`` and so on."""
        return self._record.name

    @property
    def objective(self) -> Objective:
        """What "best" means."""
        return Objective(**self._identity["objective"])

    @property
    def trials(self) -> list[Trial]:
        """Every trial so far, as it stands, by number."""
        return self._driver.trials.snapshot() if self._driver is not None else self._record.trials()

    @property
    def is_active(self) -> bool:
        """True while somebody works on the sweep, in this process or in another."""
        return (self._driver is not None and self._driver.is_alive()) or self._record.lock.is_held()

    @property
    def best(self) -> Trial:
        """The trial with the best objective on validation data, of those that finished or were pruned.

        While none has, of all that measured it. ``best.run`` is its run's name.

        Raises:
            NotFoundError: no trial has measured the objective yet.
        """
        return best_of(self.name, self.trials, self.objective)

    def frame(self) -> pd.DataFrame:
        """One row per trial: run, state, step, searched fields, validation metrics (``val_...``)."""
        return sweep_frame(self.trials, self.objective)

    def plot(self) -> Figure:
        """The objective by trial, and against each field that was searched."""
        from shoal.tune.plots import plot_sweep

        return plot_sweep(self.name, self.trials, self.objective, self._identity["space"])

    def stop(self) -> None:
        """Start no more trials, and let those that run commit and stop. Does not block; safe to repeat.

        Wherever the sweep is driven. The same command goes on with it.
        """
        if self._driver is not None and self._driver.is_alive():
            self._driver.trials.stop()
        else:
            self._record.mark_stop()

    def wait(self, *, timeout_s: float | None = None, progress: bool = True) -> Sweep:
        """Block until every trial is done, showing a table of them; returns the sweep.

        Ctrl-C stops the sweep as `stop` does and waits for that; a second one leaves at once.

        Raises:
            RecipeError: trials failed and none did better; the first one's error.
            EnvironmentFailure: the cluster failed the sweep; the same command goes on with it.
            DeadlineExceeded: ``timeout_s`` seconds passed; the sweep goes on.
        """
        if self._driver is not None:
            with reporter(self, self._driver.trials.num_trials, enabled=progress) as report:
                try:
                    self._wait(self._driver, report.update, timeout_s)
                except KeyboardInterrupt:
                    report.say(
                        "stopping: running trials commit a checkpoint and stop (Ctrl-C again: at once)"
                    )
                    self.stop()
                    self._wait(self._driver, report.update, None)
                    raise
            if (failure := self._driver.failure) is not None:
                raise failure
        self._raise_if_all_failed()
        return self

    def _wait(self, driver: SweepDriver, show: Callable[[], None], timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        seen = driver.trials.snapshot()
        while driver.is_alive():
            show()
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"sweep {self.name!r} did not end within {timeout_s:g} s; it goes on ({self!r})"
                )
            seen = driver.wait_changed(seen, _LOOK_S)
        show()

    def _raise_if_all_failed(self) -> None:
        failed = [trial for trial in self.trials if trial.state is TrialState.FAILED]
        if failed and len(failed) == len(self.trials):
            raise RecipeError(
                f"sweep {self.name!r}: all {len(failed)} trials failed, so no more were started. "
                f"{failed[0].run}: {failed[0].error}\n  full text: shoal logs {failed[0].run}. "
                "Mend the recipe and give the sweep another name; failed trials are not repeated"
            )

    def __repr__(self) -> str:
        counts = {state: sum(trial.state is state for trial in self.trials) for state in TrialState}
        words = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no trial yet"
        return f"Sweep({self.name!r}, {words})"

    def _repr_html_(self) -> str:
        return sweep_html(self.name, self.trials, self.objective)


class SweepDriver:
    """The thread that runs the trials. A daemon: a sweep whose process ends is gone on with by the next."""

    def __init__(self, trials: Trials, run: Callable[[], None], close: Callable[[], None]) -> None:
        self.trials = trials
        self.failure: ShoalError | None = None
        self._run, self._close = run, close
        self._thread = threading.Thread(target=self._main, name="shoal-sweep", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wait_changed(self, seen: list[Trial], timeout_s: float) -> list[Trial]:
        return self.trials.wait_changed(seen, timeout_s) if self.is_alive() else seen

    def _main(self) -> None:
        try:
            self._run()
        except ShoalError as err:
            self.failure = err
        except Exception as err:  # a thread's exception would vanish: `wait` raises it
            logger.debug("the sweep's driver failed", exc_info=True)
            self.failure = ClusterError(f"the sweep's driver failed: {type(err).__name__}: {err}")
        finally:
            try:
                self.trials.close()
            except ShoalError as err:  # a full disk, say: what is not booked is in the runs' journals
                self.failure = self.failure or err
            finally:
                self._close()


def best_of(sweep: str, trials: list[Trial], objective: Objective) -> Trial:
    """The best trial, preferring those that are done.

    Raises:
        NotFoundError: none has measured the objective.
    """
    best = best_trial(trials, objective)
    if best is None:
        raise NotFoundError(
            f"no trial of sweep {sweep!r} has measured its objective ({objective}) yet; wait for it, "
            f"or see why: {next((trial.error for trial in trials if trial.error), 'no trial failed')}"
        )
    return best


def open_sweep(storage: Storage, name: str) -> Sweep:
    """A sweep by name, for reading: its record needs no cluster.

    Raises:
        NotFoundError: there is no such sweep; the message lists those that exist.
    """
    return Sweep(SweepRecord(storage, name))
