"""Go on from another run's checkpoint with fields of one's own: what is inherited, and what is not.

Loading an optimizer's state brings back its old learning rate and every other hyperparameter with it, and so
does a scheduler's. So what both would be at step 0 is built twice, from the source run's fields and from the
new ones: where the two agree, the checkpoint's value stands; where they differ, a field changed it, and the
new one wins. Weights, moments and the schedule's position are inherited whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shoal.errors import NotFoundError
from shoal.recipe import from_fields
from shoal.tracking import RunRecord
from shoal.train.spec import RunSpec

if TYPE_CHECKING:
    from shoal.train.checkpoints import Loaded
    from shoal.train.session import Session

_RATES = ("lr", "_last_lr")
"""What a schedule scales: how far it has come is kept, and what it scales is new."""


def under_new_fields(loaded: Loaded, session: Session, spec: RunSpec) -> Loaded:
    """The checkpoint of ``spec.source`` with the hyperparameters of ``session``, which is at its first step.

    Raises:
        NotFoundError: the source run's record is gone, so nobody can tell what its fields were.
        RecipeError: the recipe no longer takes those fields.
    """
    assert spec.source is not None
    identity = RunRecord(spec.storage, spec.source.run).identity()
    if identity is None:
        raise NotFoundError(
            f"run {spec.source.run!r}, from whose step {spec.source.step} this run goes on, is gone; "
            "its fields are needed to tell what changed. Restore its folder, or start another run"
        )
    recipe = from_fields(type(spec.recipe), identity["fields"])
    optimizer = recipe.build_optimizer(session.model)
    scheduler = recipe.build_scheduler(optimizer)
    changed = replace(
        loaded, optimizer=inherit(loaded.optimizer, optimizer.state_dict(), session.optimizer.state_dict())
    )
    if scheduler is None or session.scheduler is None or loaded.scheduler is None:
        return changed
    return replace(
        changed, scheduler=inherit(loaded.scheduler, scheduler.state_dict(), session.scheduler.state_dict())
    )


def inherit(saved: Any, was: Any, now: Any) -> Any:
    """``saved``, but for what differs between ``was`` and ``now``: that is ``now``'s.

    All three are nests of dicts and lists. A learning rate that had moved on since step 0 is scaled by how
    much ``now`` differs from ``was``, so a schedule's progress is kept.
    """
    return _inherit(saved, was, now, is_rate=False)


def _inherit(saved: Any, was: Any, now: Any, *, is_rate: bool) -> Any:
    if isinstance(saved, dict) and isinstance(was, dict) and isinstance(now, dict):
        return {
            key: _inherit(value, was[key], now[key], is_rate=key in _RATES)
            if key in was and key in now
            else value
            for key, value in saved.items()
        }
    if isinstance(saved, list | tuple) and len(saved) == len(was) == len(now):
        return type(saved)(_inherit(*three, is_rate=is_rate) for three in zip(saved, was, now, strict=True))
    if was == now:
        return saved
    return saved * (now / was) if is_rate and saved != was and was else now
