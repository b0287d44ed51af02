"""Which fields change a model's shape: weights cannot go on under another value of such a field. No Ray here."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from shoal.recipe import Recipe, replace
from shoal.tune.space import Choice, Domain

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]


def changes_shape(recipe: Recipe, name: str, domain: Domain) -> str | None:
    """What is wrong with searching this field while weights are carried over; None when nothing is, or
    when the model cannot be built without its weights (the trial that finds out says so then).

    Builds the model, without memory for its weights, at both ends of the domain or each of its choices.
    """
    values = domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
    built = [(value, _shapes(recipe, name, value)) for value in values]
    known = [(value, shapes) for value, shapes in built if shapes is not None]
    for value, shapes in known[1:]:
        first, other = known[0]
        if shapes != other:
            weight = next(iter(sorted(key for key in {*shapes, *other} if shapes.get(key) != other.get(key))))
            return (
                f"{name}: {name}={first} and {name}={value} build models of different shape ({weight} is "
                f"{other.get(weight)} and {shapes.get(weight)}). Population-based training carries weights from one "
                f"to the other, so it can search only fields that leave the model's shape alone: fix {name}, or "
                "search with scheduler='asha'"
            )
    return None


def _shapes(recipe: Recipe, name: str, value: Any) -> Shapes | None:
    import torch

    try:
        with (
            torch.device("meta"),
            warnings.catch_warnings(action="ignore"),
        ):  # loading into nothing is warned of
            model = replace(recipe, **{name: value}).build_model()
            return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    except Exception:  # the recipe's own code; on a real device it may well work
        logger.debug("%s=%r: the model's shape cannot be told", name, value, exc_info=True)
        return None
