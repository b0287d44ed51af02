"""Where a model version comes from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.errors import RecipeError

_REFERENCE = re.compile(r"(?!__main__\b)[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Everything needed to say how a model came to be, and to build it again."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    recipe: str
    """The recipe's class, as ``module:Class``."""
    fields: Mapping[str, Any]
    """The recipe's hyperparameters, as `shoal.recipe.field_values` gives them."""
    data_fingerprint: str
    code_revision: str
    """Revision of the project's code; empty when it was not known."""
    run: str
    trial: str | None
    """Name of the trial within its sweep; None when the run was none."""
    checkpoint_step: int
    metrics: Mapping[str, float]
    """What was measured at that checkpoint."""
    created: float
    """When the version was made, in seconds since the epoch."""
    source: Mapping[str, Any] | None = None
    """``run``, ``step`` and ``digest`` of the other run's checkpoint that the run went on from; None for a run
    of its own. That run may have gone on from another, as its identity says."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives the same lineage back."""
        plain = {**dataclasses.asdict(self), "fields": dict(self.fields), "metrics": dict(self.metrics)}
        if self.source is None:
            del plain["source"]
        return plain

    @classmethod
    def from_dict(cls, values: Any) -> Lineage:
        """The lineage in ``values``, which may come from anybody.

        Raises:
            ValueError: a value is missing, unknown or of another type; the message says which.
        """
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(values)


def check_reference(recipe: str) -> None:
    """Refuse a recipe that another process could not import.

    Raises:
        RecipeError: it is not ``module:Class``, or lives in a notebook, in ``__main__`` or in a function.
    """
    if _REFERENCE.fullmatch(recipe) is None:
        raise RecipeError(
            f"the recipe {recipe!r} cannot be imported by another process, so nobody could load the model. "
            "Move it to a file of the project, such as jobs/digits.py (then it is 'jobs.digits:Digits'), "
            "train again from there, and register that run."
        )
