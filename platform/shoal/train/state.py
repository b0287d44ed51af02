"""A run's whole state as tensors and JSON: nothing that would need pickle to come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from shoal.errors import CorruptError, RecipeError


@dataclass
class Flat:
    """A nested state with its tensors taken out: ``skeleton`` is JSON-able and names them."""

    skeleton: Any
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def flatten(value: Any, *, what: str) -> Flat:
    """Take a nest of dicts, lists, tuples, numbers, strings and tensors apart. Tensors stay where they are.

    Raises:
        RecipeError: the nest holds something else; ``what`` (such as "the optimizer") names it in the message.
    """
    flat = Flat(None)
    flat.skeleton = _take_apart(value, what, "", flat.tensors)
    return flat


def unflatten(skeleton: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What `flatten` took apart.

    Raises:
        CorruptError: the skeleton names a tensor that is not there.
    """
    if isinstance(skeleton, list):
        return [unflatten(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    match skeleton:
        case {"tensor": str(name)}:
            if name not in tensors:
                raise CorruptError(f"the checkpoint names a tensor it does not hold: {name}")
            return tensors[name]
        case {"tuple": list(items)}:
            return tuple(unflatten(item, tensors) for item in items)
        case {"dict": list(pairs)}:
            return {key: unflatten(item, tensors) for key, item in pairs}
    raise CorruptError(f"the checkpoint's state has an unknown form: {sorted(skeleton)[:5]}")


def _take_apart(value: Any, what: str, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = path or "value"
        tensors[name] = value.detach()
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {
            "dict": [[_key(k, what), _take_apart(v, what, f"{path}/{k}", tensors)] for k, v in value.items()]
        }
    if isinstance(value, list | tuple):
        items = [_take_apart(v, what, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy scalar
        return _take_apart(value.item(), what, path, tensors)
    raise RecipeError(
        f"{what} keeps a {type(value).__name__} at {path or 'its top'}, which a checkpoint cannot hold "
        "without running code on load; keep numbers, strings, tensors, lists and dicts"
    )


def _key(key: Any, what: str) -> Any:
    if isinstance(key, str | int):
        return key
    raise RecipeError(f"{what} keeps a dict with a key of type {type(key).__name__}; use str or int")


def snapshot(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU of the `whole`, which shares no memory with the original."""
    return whole(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; of one that is divided among workers all of it, for which every rank must ask. Blocks then."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
