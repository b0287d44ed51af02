"""Which fields to try next: Optuna's TPE sampler behind two verbs. No Ray here."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from shoal.recipe import Objective
from shoal.tune.space import Choice, Domain, Integers, Space, Uniform, num_combinations

if TYPE_CHECKING:
    import optuna

Fields = dict[str, Any]
Outcome = Literal["finished", "pruned", "failed"]

_MAX_REDRAWS = 10
"""How often a suggestion that was tried before is drawn anew."""
_MAX_VALUES = 1025
"""Of one range, to look for fields that were not tried: more than a sweep has trials."""


class Search:
    """Suggests fields, and learns from what came of them. For one thread.

    What it suggests is a function of the seed, the number of trials asked for before and their outcomes: so a
    sweep that goes on after a crash does not draw again what it drew before.
    """

    def __init__(self, space: Space, objective: Objective, *, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space = dict(space)
        self._seed = seed
        self._distributions = {name: _distribution(domain) for name, domain in space.items()}
        self._study = optuna.create_study(direction="maximize" if objective.mode == "max" else "minimize")
        self._open: dict[str, optuna.trial.Trial] = {}  # what was asked and not told yet, by its fields
        self._tried: set[str] = set()

    @property
    def is_exhausted(self) -> bool:
        """Whether every combination of a finite space was asked for."""
        return len(self._tried) >= num_combinations(self.space)

    def ask(self) -> Fields | None:
        """The fields of the next trial, never twice the same; None when the space is exhausted."""
        if self.is_exhausted:
            return None
        for redraw in range(_MAX_REDRAWS):
            trial = self._draw(redraw)
            fields = {name: _decode(self.space[name], value) for name, value in trial.params.items()}
            if _key(fields) not in self._tried:
                return self._opened(trial, fields)
            self._study.tell(trial, state=_optuna_state("failed"))
        return self.resume(self._first_untried())

    def resume(self, fields: Mapping[str, Any]) -> Fields:
        """Ask for exactly these fields: a trial that an earlier driver left unfinished."""
        self._study.enqueue_trial({name: _encode(self.space[name], fields[name]) for name in self.space})
        return self._opened(self._draw(0), dict(fields))

    def tell(
        self, fields: Mapping[str, Any], outcome: Outcome, value: float | None, *, step: int = 0
    ) -> None:
        """What came of these fields; those that were never asked for (an earlier driver's) are added.

        ``value`` is the objective, or None where it was never measured.
        """
        import optuna

        if outcome != "failed" and (value is None or math.isnan(value)):
            outcome = "failed"
        measured = outcome == "finished"
        trial = self._open.pop(_key(fields), None)
        if trial is not None:
            if outcome == "pruned" and value is not None:
                trial.report(value, step)  # TPE ranks pruned trials by how far and how well they got
            self._study.tell(trial, value if measured else None, state=_optuna_state(outcome))
            return
        self._tried.add(_key(fields))
        params = {name: _encode(self.space[name], fields[name]) for name in self.space}
        self._study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=self._distributions,
                value=value if measured else None,
                intermediate_values={step: value} if outcome == "pruned" and value is not None else None,
                state=_optuna_state(outcome),
            )
        )

    def _draw(self, redraw: int) -> optuna.trial.Trial:
        import optuna

        number = f"{self._seed}/{len(self._tried)}/{redraw}"
        seed = int.from_bytes(hashlib.sha256(number.encode()).digest()[:4], "big")
        # constant_liar: trials that still run count as bad, so that concurrent trials spread out.
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        return self._study.ask(self._distributions)

    def _opened(self, trial: optuna.trial.Trial, fields: Fields) -> Fields:
        self._tried.add(_key(fields))
        self._open[_key(fields)] = trial
        return fields

    def _first_untried(self) -> Fields:
        """For a finite space that is nearly used up, or a sampler that insists on what it drew before."""
        axes = [[(name, value) for value in _values(domain)] for name, domain in self.space.items()]
        return next(
            fields
            for combination in itertools.product(*axes)
            if _key(fields := dict(combination)) not in self._tried
        )


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match domain:
        case Choice(values):
            return CategoricalDistribution(tuple(range(len(values))))  # by index: values may be lists
        case Integers(low, high, log):
            return IntDistribution(low, high, log=log)
        case Uniform(low, high, log):
            return FloatDistribution(low, high, log=log)


def _decode(domain: Domain, value: Any) -> Any:
    return domain.values[value] if isinstance(domain, Choice) else value


def _encode(domain: Domain, value: Any) -> Any:
    return domain.values.index(value) if isinstance(domain, Choice) else value


def _values(domain: Domain) -> list[Any]:
    match domain:
        case Choice(values):
            return list(values)
        case Integers(low, high):
            num_steps = min(high - low, _MAX_VALUES - 1)
            return [low + (high - low) * part // num_steps for part in range(num_steps + 1)]
        case Uniform(low, high):
            return [low + (high - low) * part / (_MAX_VALUES - 1) for part in range(_MAX_VALUES)]


def _key(fields: Mapping[str, Any]) -> str:
    return json.dumps(dict(fields), sort_keys=True, default=repr)


def _optuna_state(outcome: Outcome) -> Any:
    from optuna.trial import TrialState

    return {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[outcome]
