"""Who a name belongs to: claimed once, compared ever after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import CorruptError, IdentityError
from shoal.storage.files import create_json, read_json

_ABSENT = object()


def claim(path: Path, identity: Mapping[str, Any], *, what: str, advice: str) -> bool:
    """Write ``identity`` to ``path``, once and for all: True if the name was free, False if it already is its.

    Of several processes that claim a free name at once exactly one gets True. ``what`` names the claimed thing
    and ``advice`` what to do when it is another's, both for the message.

    Raises:
        IdentityError: the name belongs to another identity; the message shows every difference.
        CorruptError: what is recorded cannot be read.
        StorageError: it cannot be written.
    """
    asked = json.loads(json.dumps(dict(identity)))  # as it will be read back: tuples become lists
    if create_json(path, asked):
        return True
    recorded = read_json(path)
    if not isinstance(recorded, Mapping):
        raise CorruptError(f"{path} is damaged: it holds no identity. Restore it, or choose another name.")
    wrong = differences(recorded, asked)
    if wrong:
        lines = [f"  {field}: it has {has}, you asked for {wants}" for field, has, wants in wrong]
        raise IdentityError("\n".join([f"{what} exists with another identity:", *lines, advice]))
    return False


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, str, str]]:
    """Every leaf that differs: dotted path, old and new value as JSON (``nothing`` where it is absent).

    True is not 1, but 1 is 1.0.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            difference
            for key in [*old, *(key for key in new if key not in old)]
            for difference in differences(
                old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}" if path else key
            )
        ]
    if isinstance(old, bool) == isinstance(new, bool) and (old == new or _show(old) == _show(new)):
        return []
    return [(path, _show(old), _show(new))]


def _show(value: Any) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value)
