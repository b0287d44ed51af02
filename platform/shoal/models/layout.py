"""Where each byte of a safetensors file goes, before there is one: so that it can be made in place, in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = {"format": "pt"}
"""The metadata that other readers of safetensors expect."""
_KINDS = (
    ("bool", "BOOL"),
    ("uint8", "U8"),
    ("int8", "I8"),
    ("float8_e5m2", "F8_E5M2"),
    ("float8_e4m3fn", "F8_E4M3"),
    ("int16", "I16"),
    ("uint16", "U16"),
    ("float16", "F16"),
    ("bfloat16", "BF16"),
    ("int32", "I32"),
    ("uint32", "U32"),
    ("float32", "F32"),
    ("complex64", "C64"),
    ("float64", "F64"),
    ("int64", "I64"),
    ("uint64", "U64"),
)
"""torch's names and safetensors' names, in the order in which safetensors sorts them (the last come first)."""
_CODES = dict(_KINDS)
_RANKS = {name: -rank for rank, (name, _) in enumerate(_KINDS)}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Layout:
    """A safetensors file as its first bytes and the place of each tensor behind them."""

    header: bytes
    """The file's first bytes, up to the first tensor."""
    places: Mapping[str, int]
    """Where in the file each tensor begins; its bytes are contiguous, in row-major order."""
    aliases: Mapping[str, str]
    """Other names of tensors that have a place, by name."""
    size_bytes: int
    """Of the whole file."""


def plan_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """The file that `save_tensors` writes of ``tensors``, without its content: byte for byte the same.

    A tensor that is there under several names has one place; the other names go into the metadata.

    Raises:
        RecipeError: a value is not a dense tensor of a type that safetensors knows.
    """
    names: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for name, tensor in tensors.items():
        check_dense(name, tensor)
        first = names.setdefault(place_of(tensor), name)
        if first != name:
            aliases[name] = first
            continue
        kinds[name] = str(tensor.dtype).removeprefix("torch.")
        if kinds[name] not in _CODES:
            raise RecipeError(f"{name} is of {tensor.dtype}, which safetensors does not know")
    entries: dict[str, Any] = {"__metadata__": {**aliases, **FORMAT}}
    begin = 0
    for name in sorted(kinds, key=lambda name: (_RANKS[kinds[name]], name.encode())):
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _CODES[kinds[name]],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    places = {
        name: len(header) + entry["data_offsets"][0]
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    return Layout(header, places, aliases, len(header) + begin)


def place_of(tensor: Tensor) -> Any:
    """Equal for tensors that are one and the same memory, seen in the same way."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def check_dense(name: str, tensor: Any) -> None:
    """Pass if safetensors can hold such a value.

    Raises:
        RecipeError: it is no tensor, or a sparse or quantized one.
    """
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
        raise RecipeError(
            f"{name} is a {type(tensor).__name__}; only plain dense tensors can be stored, never pickled objects"
        )
