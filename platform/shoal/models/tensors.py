"""Named tensors as one safetensors file: reading it runs no code."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import CorruptError, RecipeError
from shoal.models.layout import FORMAT, check_dense, place_of

if TYPE_CHECKING:
    from torch import Tensor

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` to ``path``, in any memory layout, from any device.

    A tensor that is there under several names (tied weights) is written once; the other names go into the
    file's metadata, as ``safetensors.torch.save_model`` does it. Not synced: that is `storage.commit`'s task.

    Raises:
        OSError: the disk is full, read-only or gone.
        RecipeError: a value is not a dense tensor of a type that safetensors knows.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unique, aliases = _separate(tensors)
    try:
        save_file(unique, path, metadata={**aliases, **FORMAT})
    except SafetensorError as error:
        # It has no OSError of its own, but ends its text with the number, in Rust's words.
        if (match := _OS_ERROR.search(str(error))) is None:
            raise RecipeError(f"cannot store the tensors as safetensors: {error}") from error
        number = int(match.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that `save_tensors` wrote, on the CPU; names of one tied tensor share memory.

    Raises:
        CorruptError: the file is not what `save_tensors` writes.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CorruptError(f"{path} is not a safetensors file ({error}). It is not used.") from error
    aliases = {alias: name for alias, name in metadata.items() if (alias, name) not in FORMAT.items()}
    if unknown := sorted(name for name in aliases.values() if name not in tensors):
        raise CorruptError(f"{path} ties names to {unknown[0]!r}, which it does not hold. It is not used.")
    return {**tensors, **{alias: tensors[name] for alias, name in aliases.items() if alias not in tensors}}


def _separate(tensors: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, as safetensors demands, and other names of the same tensors."""
    import torch

    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names_by_place: dict[Any, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        check_dense(name, tensor)
        tensor = tensor.detach()
        place = place_of(tensor)
        if place in names_by_place:
            aliases[name] = names_by_place[place]
            continue
        names_by_place[place] = name
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        else:
            storages.add(storage)
        unique[name] = tensor
    return unique, aliases
