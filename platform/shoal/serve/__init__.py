"""Apps that answer with a model: write one (`Endpoint`, `app`), deploy it (`deploy`), ask it (`App.predict`).

The names below load when first used; the serving core (`shoal.serve.core`, `Endpoint`) needs no Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.serve.builder import app as app
    from shoal.serve.core.answer import Refusal as Refusal
    from shoal.serve.core.gate import Limits as Limits
    from shoal.serve.core.picture import to_grey as to_grey
    from shoal.serve.core.pixels import read_pixels as read_pixels
    from shoal.serve.deploying import apps as apps
    from shoal.serve.deploying import delete as delete
    from shoal.serve.deploying import deploy as deploy
    from shoal.serve.endpoint import Endpoint as Endpoint
    from shoal.serve.handle import App as App
    from shoal.serve.handle import AppStatus as AppStatus

_HOME = {
    "App": "shoal.serve.handle",
    "AppStatus": "shoal.serve.handle",
    "Endpoint": "shoal.serve.endpoint",
    "Limits": "shoal.serve.core.gate",
    "Refusal": "shoal.serve.core.answer",
    "app": "shoal.serve.builder",
    "apps": "shoal.serve.deploying",
    "delete": "shoal.serve.deploying",
    "deploy": "shoal.serve.deploying",
    "read_pixels": "shoal.serve.core.pixels",
    "to_grey": "shoal.serve.core.picture",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shoal.serve' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
