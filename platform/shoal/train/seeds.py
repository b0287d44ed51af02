"""Random numbers that a resumed run draws again exactly."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from named parts; equal parts give equal seeds on every machine and Python."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), Python's ``random`` and numpy's global generator."""
    import numpy as np

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def capture_random_state() -> dict[str, Any]:
    """The state of every generator that `seed_everything` seeds, as tensors and JSON-able values."""
    import numpy as np

    name, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype("int64")), position, has_gauss, cached],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `capture_random_state` gave."""
    import numpy as np

    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
