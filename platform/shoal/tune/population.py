"""Population-based training: when trials are compared, and how a field changes on the way. No Ray here.

Jaderberg et al., "Population Based Training of Neural Networks" (2017): now and then a trial among the worst
is replaced by a copy of one among the best, with fields changed a little. Who is replaced by whom, Ray Tune's
scheduler decides (`shoal.tune.ray_population`).
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping
from typing import Any

from shoal.tune.space import Choice, Domain, Integers, Space

logger = logging.getLogger(__name__)

MIN_POPULATION = 4
"""Of fewer trials a quarter, the part that is replaced, is none."""
RESAMPLE_PROBABILITY = 0.25
"""How often a field is drawn anew from its whole domain; Ray Tune's default."""
FACTORS = (0.8, 1.2)
"""What a number is multiplied by otherwise; the paper's, and Ray Tune's default."""
_NUM_INTERVALS = 5
_MAX_REDRAWS = 10


def default_interval(steps: int, eval_every: int) -> int:
    """Steps between two comparisons of a trial: the evaluation nearest to a fifth of the steps, at least one."""
    return max(1, round(steps / _NUM_INTERVALS / eval_every)) * eval_every


def check_population(
    *, trials: int, side_by_side: int, steps: int, eval_every: int, perturb_every: int | None
) -> list[str]:
    """Everything that makes population-based training impossible as asked; empty when it is possible.

    Logs a warning where it is possible and `too_few_comparisons`.
    ``side_by_side`` is how many trials may run at a time: all that were asked for, and that fit.
    """
    problems = []
    if trials < MIN_POPULATION:
        problems.append(
            f"trials={trials}: a population has at least {MIN_POPULATION}, else there are no best and worst quarters"
        )
    if side_by_side < trials:
        problems.append(
            f"trials={trials}, but only {side_by_side} at a time: a population trains side by side. Ask for "
            f"at most {side_by_side} trials, for more at a time (concurrent=, --concurrent), or for less per trial "
            "(cpus_per_worker=)"
        )
    if steps <= eval_every:
        problems.append(
            f"steps={steps} with eval_every={eval_every}: trials are compared at evaluations before the last step, "
            "and there are none; lower eval_every or raise steps"
        )
    elif perturb_every is not None and not 1 <= perturb_every < steps:
        problems.append(
            f"perturb_every={perturb_every}: from 1 to below the {steps} steps of a trial; "
            f"left out it is {default_interval(steps, eval_every)}"
        )
    if not problems:
        interval = perturb_every or default_interval(steps, eval_every)
        if warning := too_few_comparisons(steps=steps, eval_every=eval_every, interval=interval):
            logger.warning("%s", warning)
    return problems


def too_few_comparisons(*, steps: int, eval_every: int, interval: int) -> str:
    """Why such trials may replace nobody, and what to choose instead; empty when they are compared often enough.

    A trial is compared at the first evaluation ``interval`` steps or more after the last comparison, never at its
    last step; and with those only that were compared before it. So at a first comparison the worst trial stays
    if it is the first that comes there; at a second one every trial has a result.
    """
    spacing = -(-interval // eval_every) * eval_every
    num_comparisons = (steps - 1) // spacing
    if num_comparisons >= 2:
        return ""
    most = (steps - 1) // 2
    choices = [f"steps above {2 * spacing}"]
    if most >= eval_every:
        choices.insert(0, f"perturb_every of at most {most // eval_every * eval_every}")
    elif most:
        choices.insert(0, f"eval_every of at most {most}")
    return (
        f"perturb_every={interval} with steps={steps} and eval_every={eval_every}: a trial is compared "
        f"{'once' if num_comparisons else 'never'} before its last step, so that maybe none is replaced; "
        f"choose {', or '.join(choices)}"
    )


def perturb(fields: Mapping[str, Any], space: Space, *, seed: str) -> dict[str, Any]:
    """The fields of a trial that goes on from one with ``fields``: each a little different, or drawn anew.

    Always inside the space, whole numbers staying whole; at least one field changes. The same seed gives the
    same fields.
    """
    rng = random.Random(hashlib.sha256(seed.encode()).digest())
    found = dict(fields)
    for _ in range(_MAX_REDRAWS):
        found = {name: _perturb(fields[name], domain, rng) for name, domain in space.items()}
        if found != fields:
            break
    return found


def _perturb(value: Any, domain: Domain, rng: random.Random) -> Any:
    is_drawn = rng.random() < RESAMPLE_PROBABILITY
    match domain:
        case Choice(values):
            place = values.index(value) + rng.choice((-1, 1))
            return rng.choice(values) if is_drawn else values[min(max(place, 0), len(values) - 1)]
        case Integers(low, high, log):
            if is_drawn:
                return min(round(_draw(low, high, log, rng)), high)
            factor = rng.choice(FACTORS)
            moved = round(value * factor)
            if moved == value:  # small numbers would never move
                moved += 1 if factor > 1 else -1
            return min(max(moved, low), high)
    moved = _draw(domain.low, domain.high, domain.log, rng) if is_drawn else value * rng.choice(FACTORS)
    return min(max(moved, domain.low), domain.high)


def _draw(low: float, high: float, log: bool, rng: random.Random) -> float:
    return low * (high / low) ** rng.random() if log else rng.uniform(low, high)
