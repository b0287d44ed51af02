"""Ray Tune's population-based training, whose exploit ends one trial and begins another.

Ray's own exploit changes a trial in place: it pauses it, gives it the other's checkpoint, which Tune must hold,
and other fields, and starts it again. Here a run is what its identity says from its first step to its last, and
checkpoints are in its folder. So of Ray's scheduler we take the decisions (when a trial is looked at, who is
among the worst, from whom it learns) and carry them out in words that every scheduler has: the worse trial is
stopped, and the next one that is suggested goes on from a copy of the better one's checkpoint. Nothing is ever
paused, so nothing waits for another trial.

``tests/tune/test_ray_population.py`` fails, naming what to look at, when an upgrade moves a private name used here.
Imports ray at the top: it is only imported to run a sweep.
"""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from shoal.errors import ShoalError
from shoal.recipe import Objective
from shoal.tune.trials import Trials

logger = logging.getLogger(__name__)

_ALONE = SimpleNamespace(get_trials=list, search_alg=None)
"""What Ray's scheduler sees of Tune: no other trials, for whose sake it would pause one, and no sampler, beside
which it refuses to work because it would change what the sampler suggested."""


class Population(PopulationBasedTraining):  # type: ignore[misc]  # Ray has no types
    """Compares each trial with the others every ``interval`` steps, and replaces it if it is among the worst."""

    def __init__(self, trials: Trials, objective: Objective, *, metric: str, interval: int) -> None:
        super().__init__(
            time_attr="step",
            metric=metric,
            mode=objective.mode,
            perturbation_interval=interval,
            custom_explore_fn=dict,  # Ray insists on one; `Trials.exploit` chooses the fields
            log_config=False,
        )
        self._trials = trials
        self._is_replaced = False

    @property
    def has_live(self) -> bool:
        """Whether a trial is under way, so that another may come to replace it."""
        return any(not trial.is_finished() for trial in self._trial_state)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if trial in self._trial_state:
            return  # its process died; it goes on, and is known
        super().on_trial_add(_ALONE, trial)
        self._trial_state[trial].last_perturbation_time = trial.config["step"]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._is_replaced = False
        decision = super().on_trial_result(_ALONE, trial, result)
        return TrialScheduler.STOP if self._is_replaced else str(decision)

    def _checkpoint_or_exploit(
        self, trial: Any, tune_controller: Any, upper_quantile: list[Any], lower_quantile: list[Any]
    ) -> None:
        """Called by Ray's scheduler for a trial that has been measured ``interval`` steps after the last time."""
        if trial not in lower_quantile:
            return
        winner = random.Random(f"{trial.trial_id}/{trial.config['trial']}").choice(upper_quantile)
        loser, winner = trial.config["trial"], winner.config["trial"]
        try:
            self._is_replaced = self._trials.exploit(loser, winner) is not None
        except ShoalError as err:
            logger.warning("trial %d goes on, not replaced by one like trial %d: %s", loser, winner, err)

    def __reduce__(self) -> Any:
        return TrialScheduler, ()  # Tune pickles it with its own state, which nobody reads
