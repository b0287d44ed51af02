"""What a worker is told: one run, whole, in one frozen value."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from shoal.recipe import Recipe, field_values, recipe_ref
from shoal.storage import Storage
from shoal.train.bad_steps import OnNan

Precision = Literal["fp32", "bf16"]
"""Of the forward pass."""
Strategy = Literal["ddp", "fsdp", "hybrid"]
"""What of a run's state every worker holds: all of it; its part, of all workers' or of its machine's (`sharded`)."""
EvalListener = Callable[[int, Mapping[str, float]], None]
"""Told on rank 0 of every look at the validation data: (step, values)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The checkpoint of another run from which a run goes on, with fields of its own."""

    run: str
    step: int
    digest: str
    """Of the checkpoint's manifest, which covers every byte of it."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training of one recipe. Travels to the workers."""

    recipe: Recipe
    name: str
    storage: Storage
    target_steps: int
    seed: int = 0
    precision: Precision = "fp32"
    strategy: Strategy = "ddp"
    shards: int | None = None
    """Into how many virtual shards an exact run divides every batch; None for a fast run."""
    micro_batch: int | None = None
    """The most samples that go through the model at a time; gradients of the others of a batch are accumulated. None:
    a worker's whole share of a batch, unless memory was short before."""
    on_nan: OnNan = "fail"
    """What to do at a NaN or infinite loss."""
    checkpoint_every_s: float | None = 30.0
    """Seconds between checkpoints; None for as often as costs 1 % of the time. There is always one at the end, and
    one at every new best."""
    checkpoint_at_eval: bool = False
    """Whether every evaluation is reported only when a checkpoint of that very step is committed."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Best checkpoints by the recipe's objective to keep besides."""
    init_from: Path | None = None
    """Folder of a model version whose weights a fresh run starts from."""
    init_from_name: str | None = None
    """That version as the user knows it, such as ``digits@1``."""
    source: Source | None = None
    """The other run's checkpoint that this run goes on from; its folder must hold the copy already."""
    revision: str = ""
    """The project's code revision; recorded, and a change of it is warned of. Empty where it is not known."""
    threads: int | None = None
    """torch's threads per worker; None leaves them as they are."""
    driver: int | None = None
    """The token with which the driver of these workers began (`shoal.storage.fence`); None where there is none."""

    def identity(self) -> dict[str, Any]:
        """What must not change when the run is resumed. The data's fingerprint is checked by the workers."""
        identity = identity_of(
            self.recipe,
            seed=self.seed,
            precision=self.precision,
            shards=self.shards,
            init_from=self.init_from_name,
        )
        return identity if self.source is None else {**identity, "source": asdict(self.source)}


def identity_of(
    recipe: Recipe, *, seed: int, precision: Precision, shards: int | None, init_from: str | None
) -> dict[str, Any]:
    """A run's identity: recipe, fields, seed, precision and starting weights, JSON-able.

    Not the strategy, the micro-batch, nor the number of workers: a run may go on with others.
    """
    return {
        "recipe": recipe_ref(recipe),
        "objective": {"metric": recipe.objective.metric, "mode": recipe.objective.mode},
        "fields": field_values(recipe),
        "seed": seed,
        "precision": precision,
        "exact": shards is not None,
        **({} if shards is None else {"shards": shards}),
        "init_from": init_from,
    }


def default_name(identity: Mapping[str, Any], infix: str = "") -> str:
    """The name of what has no other, ``<recipe>-<infix><8 hex of the identity>``.

    So the same command finds the same run or sweep again, and another ``lr`` is another one.
    """
    class_name = str(identity["recipe"]).rpartition(":")[2].lower()
    return f"{re.sub(r'[^a-z0-9]', '', class_name)[:60] or 'run'}-{infix}{digest_of(identity)[:8]}"


def digest_of(identity: Mapping[str, Any] | None) -> str:
    """64 hex digits that tell one identity from another; None, a run that has none, has a digest too."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
