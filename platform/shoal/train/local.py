"""Train a recipe in this process: no cluster, no storage, breakpoints work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoal.recipe import Recipe
from shoal.train.group import Group
from shoal.train.loader import build_data
from shoal.train.options import RunOptions
from shoal.train.quarantine import BadSample
from shoal.train.reduce import Wishes
from shoal.train.session import Session

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


@dataclass(frozen=True)
class Fitted:
    """What `Recipe.fit` returns: the model as the last step left it, and what was measured."""

    model: nn.Module
    """In eval mode."""
    step: int
    val: dict[str, float]
    test: dict[str, float]
    """Empty if the recipe has no test data."""
    history: list[dict[str, float]] = field(repr=False)

    def metrics(self) -> pd.DataFrame:
        """Training metrics, one row per step."""
        import pandas as pd

        return pd.DataFrame(self.history).set_index("step")


class _Listener:
    """The boundary of a run that keeps nothing."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def wishes(self) -> Wishes:
        return Wishes()

    def before_update(self) -> None:
        pass

    def after_step(self, session: Session, wishes: Wishes) -> bool:
        self.history.append({"step": session.steps_done, **(session.take_progress() or {})})
        return session.steps_done >= session.target_steps

    def bad_sample(self, bad: BadSample) -> None:
        pass  # the session has logged why

    def bad_step(self, step: int, samples: list[int], reason: str) -> None:
        raise AssertionError("without a record, on_nan is 'fail'")


def fit(recipe: Recipe, *, steps: int | None = None, seed: int = 0) -> Fitted:
    """Train ``recipe`` here for ``steps`` (default: the recipe's) and measure it. Blocks.

    Gives the weights that a one-worker run of the same seed gives, on the same device and thread count.

    Raises:
        RequestError: ``steps`` or ``seed`` that cannot be.
        RecipeError: the recipe cannot be trained; whatever its own code raises comes out as it is.
    """
    RunOptions(steps=steps, seed=seed)  # checks them
    listener = _Listener()
    session = Session(
        recipe,
        build_data(recipe, seed),
        Group.alone(),
        listener,
        seed=seed,
        target_steps=recipe.steps if steps is None else steps,
    )
    try:
        recipe.train(session)
        val = session.evaluate(session.data.val)
        test = session.evaluate(session.data.test) if session.data.test is not None else {}
    finally:
        session.close()
    return Fitted(session.model.eval(), session.steps_done, val, test, listener.history)
