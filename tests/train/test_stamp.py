"""Which folder is which checkpoint of which run; no torch, no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import CorruptError
from shoal.storage import NO_TOKEN, Manifest, commit
from shoal.train.spec import digest_of
from shoal.train.stamp import check_stamp, checkpoint_path, names_checkpoint, position_of, stamp

MINE: dict[str, Any] = {"recipe": "toy:Toy", "seed": 0}
OTHER = {**MINE, "seed": 1}


def checkpoint(
    parent: Path,
    *,
    identity: Any = MINE,
    step: int = 7,
    name_token: int = 3,
    state: str | None = None,
    **meta: Any,
) -> tuple[Path, Manifest]:
    directory = checkpoint_path(parent, 7, name_token)

    def write(folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps({"step": 7}) if state is None else state)

    return directory, commit(
        directory, write, meta={**stamp(step=step, run=digest_of(identity), token=3), **meta}
    )


def test_a_runs_own_checkpoint_passes(tmp_path: Path) -> None:
    check_stamp(*checkpoint(tmp_path), {"seed": 0, "recipe": "toy:Toy"})


def test_the_copy_that_a_run_went_on_from_passes_and_no_other_of_that_run(tmp_path: Path) -> None:
    directory, manifest = checkpoint(tmp_path, identity=OTHER, name_token=NO_TOKEN)
    source = {"run": "other", "step": 7, "digest": manifest.digest}
    check_stamp(directory, manifest, {**MINE, "source": source})
    with pytest.raises(CorruptError, match="of another run"):
        check_stamp(directory, manifest, {**MINE, "source": {**source, "digest": "0" * 64}})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"identity": OTHER}, "a checkpoint of another run"),
        ({"identity": None}, "a checkpoint of another run"),
        ({"run": None}, "a checkpoint of another run"),
        ({"step": 8}, "the checkpoint of step 8"),
        ({"kind": "model"}, "no checkpoint"),
        ({"name_token": 4}, "written under token 3"),
        ({"token": None}, "written under token None"),
        ({"state": '{"step": 8}'}, r"state\.json is not of that step"),
        ({"state": "[]"}, r"state\.json is not of that step"),
        ({"state": "{"}, "not JSON"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CorruptError, match=match):
        check_stamp(*checkpoint(tmp_path, **changes), MINE)


def test_under_another_steps_name_it_is_refused(tmp_path: Path) -> None:
    directory, manifest = checkpoint(tmp_path)
    with pytest.raises(CorruptError, match="the checkpoint of step 7"):
        check_stamp(directory.rename(checkpoint_path(tmp_path, 9, 3)), manifest, MINE)


def test_only_a_checkpoints_name_names_one() -> None:
    assert [position_of(checkpoint_path(Path("x"), 7, token)) for token in (0, 4)] == [(7, 0), (7, 4)]
    assert checkpoint_path(Path("x"), 7, NO_TOKEN).name == "step-0000000007"
    assert names_checkpoint("step-0000000007")
    assert names_checkpoint("step-0000000007-t000004")
    for name in (
        "step-0000000007.bak",
        "step-0000000007-t000004.bak",
        "step-0000000007-t4",
        "step-7",
        "step-0000000007\n",
        "step-٠٠٠٠٠٠٠٠٠٧",
        "copy-0000000007",
    ):
        assert not names_checkpoint(name)
