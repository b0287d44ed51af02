"""One Ray cluster, one AI platform: train, tune, register and serve from one ``cluster.yaml``.

Importing this starts nothing and loads neither torch nor ray; the names below are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.errors import ShoalError as ShoalError
    from shoal.recipe import Datasets as Datasets
    from shoal.recipe import Recipe as Recipe
    from shoal.recipe import maximize as maximize
    from shoal.recipe import minimize as minimize

__version__ = "0.1.0"

_HOME = {
    "Datasets": "shoal.recipe",
    "Recipe": "shoal.recipe",
    "ShoalError": "shoal.errors",
    "maximize": "shoal.recipe",
    "minimize": "shoal.recipe",
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
