"""Which folder is which checkpoint of which run: by its name, and by what its manifest says. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import CorruptError
from shoal.storage import Manifest, read_json
from shoal.train.spec import digest_of

STATE_FILE = "state.json"
_KIND = "checkpoint"
_NAME = re.compile(r"step-[0-9]{10}")


def checkpoint_path(parent: Path, step: int) -> Path:
    """Where the checkpoint of a step lives; names sort by step."""
    return parent / f"step-{step:010d}"


def step_of(directory: Path) -> int:
    """The step a checkpoint's folder is named after."""
    return int(directory.name.removeprefix("step-"))


def names_checkpoint(name: str) -> bool:
    """Whether a folder of that name may be a checkpoint.

    Anything else beside them, such as a copy that somebody made, is none: never used, reported or deleted.
    """
    return _NAME.fullmatch(name) is not None


def stamp(*, step: int, run: str) -> dict[str, Any]:
    """What a checkpoint's manifest says of it; ``run`` is the `digest_of` its run's identity."""
    return {"kind": _KIND, "step": step, "run": run}


def check_stamp(directory: Path, manifest: Manifest, identity: Mapping[str, Any] | None) -> None:
    """Pass if the verified ``directory`` is what its name says: a checkpoint of that step, of the run ``identity``.

    That is one the run wrote, or the copy of another's from which it went on. None is a run without an identity.

    Raises:
        CorruptError: it is of another run or another step, its ``state.json`` says another, or it is none at all.
        StorageError: it cannot be read now.
    """
    meta = manifest.meta
    if not names_checkpoint(directory.name) or meta.get("kind") != _KIND:
        raise _not_used(directory, "no checkpoint of a run")
    step = step_of(directory)
    if meta.get("step") != step:
        raise _not_used(directory, f"the checkpoint of step {meta.get('step')}")
    if meta.get("run") != (mine := digest_of(identity)) and manifest.digest != _source_digest(identity):
        raise _not_used(
            directory,
            f"a checkpoint of another run (of identity {str(meta.get('run'))[:8]}; this run's is {mine[:8]})",
        )
    if STATE_FILE not in manifest.files:
        raise _not_used(directory, f"without a {STATE_FILE}")
    state = read_json(directory / STATE_FILE)
    if not isinstance(state, dict) or state.get("step") != step:
        raise _not_used(directory, f"its {STATE_FILE} is not of that step")


def _source_digest(identity: Mapping[str, Any] | None) -> str | None:
    """Of the checkpoint that a run of a population went on from; its copy says the run it came from."""
    source = (identity or {}).get("source")
    return source.get("digest") if isinstance(source, dict) else None


def _not_used(directory: Path, reason: str) -> CorruptError:
    return CorruptError(f"{directory} is whole, but {reason}. It is not used.")
