"""Which folder is which checkpoint of which run: by its name, and by what its manifest says. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import CorruptError
from shoal.storage import NO_TOKEN, Manifest, Succession, read_json
from shoal.tracking import RunRecord
from shoal.train.spec import digest_of

STATE_FILE = "state.json"
_KIND = "checkpoint"
_NAME = re.compile(r"step-([0-9]{10})(?:-t([0-9]{6}))?")


def checkpoint_path(parent: Path, step: int, token: int) -> Path:
    """Where the checkpoint of a step lives that the holder of ``token`` wrote; names sort by step, then by token.

    `NO_TOKEN` names one that a run of a population went on from, or of the time before there were tokens.
    """
    return parent / (f"step-{step:010d}" if token == NO_TOKEN else f"step-{step:010d}-t{token:06d}")


def step_of(directory: Path) -> int:
    """The step a checkpoint's folder is named after."""
    return position_of(directory)[0]


def position_of(directory: Path) -> tuple[int, int]:
    """The step and the token that a checkpoint's folder is named after."""
    found = _NAME.fullmatch(directory.name)
    assert found is not None, directory
    return int(found[1]), int(found[2] or NO_TOKEN)


def names_checkpoint(name: str) -> bool:
    """Whether a folder of that name may be a checkpoint.

    Anything else beside them, such as a copy that somebody made, is none: never used, reported or deleted.
    """
    return _NAME.fullmatch(name) is not None


def checkpoint_folders(parent: Path) -> list[Path]:
    """The folders in ``parent`` that are named like checkpoints, whether they count or not; oldest step first."""
    return sorted(path for path in parent.glob("*") if names_checkpoint(path.name) and path.is_dir())


def counting(parent: Path, succession: Succession) -> list[Path]:
    """Those of `checkpoint_folders` that no later driver went back behind; not verified here."""
    return [path for path in checkpoint_folders(parent) if succession.counts(*position_of(path))]


def newest_token(parent: Path) -> int:
    """The last token under which a folder in ``parent`` was written."""
    return max((position_of(path)[1] for path in checkpoint_folders(parent)), default=NO_TOKEN)


def checkpoint_at(record: RunRecord, step: int) -> Path | None:
    """The run's checkpoint of a step, None where there is none that counts. Not verified here."""
    there = counting(record.checkpoints_dir, record.fence.succession())
    return next((path for path in reversed(there) if step_of(path) == step), None)


def stamp(*, step: int, run: str, token: int) -> dict[str, Any]:
    """What a checkpoint's manifest says of it; ``run`` is the `digest_of` its run's identity."""
    return {"kind": _KIND, "step": step, "run": run, "token": token}


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
    step, token = position_of(directory)
    if meta.get("step") != step:
        raise _not_used(directory, f"the checkpoint of step {meta.get('step')}")
    if token not in (NO_TOKEN, meta.get("token")):
        raise _not_used(directory, f"written under token {meta.get('token')}")
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
