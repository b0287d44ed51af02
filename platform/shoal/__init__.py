"""One Ray cluster, one AI platform: train, tune, register and serve from one ``cluster.yaml``.

Importing this starts nothing and loads neither torch nor ray; the names below are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.api import Cluster as Cluster
    from shoal.api import Model as Model
    from shoal.api import connect as connect
    from shoal.cli.job import main as main
    from shoal.errors import ShoalError as ShoalError
    from shoal.recipe import Datasets as Datasets
    from shoal.recipe import Recipe as Recipe
    from shoal.recipe import maximize as maximize
    from shoal.recipe import minimize as minimize
    from shoal.train.run import Run as Run
    from shoal.train.session import Session as Session
    from shoal.tune.space import choice as choice
    from shoal.tune.space import loguniform as loguniform
    from shoal.tune.space import randint as randint
    from shoal.tune.space import uniform as uniform

__version__ = "0.1.0"

_HOME = {
    "Cluster": "shoal.api",
    "Datasets": "shoal.recipe",
    "Model": "shoal.api",
    "Recipe": "shoal.recipe",
    "Run": "shoal.train.run",
    "Session": "shoal.train.session",
    "ShoalError": "shoal.errors",
    "choice": "shoal.tune.space",
    "connect": "shoal.api",
    "loguniform": "shoal.tune.space",
    "main": "shoal.cli.job",
    "maximize": "shoal.recipe",
    "minimize": "shoal.recipe",
    "randint": "shoal.tune.space",
    "uniform": "shoal.tune.space",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
