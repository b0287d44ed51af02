"""The judge of faults can condemn: each test damages what a sound run left, and it must say so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.audit import Left, Shape, check_processes, completed_by, num_lost, problems
from shoal.storage import MANIFEST, Storage, commit
from shoal.tracking import RunRecord, RunState
from shoal.train.stamp import checkpoint_path, stamp
from waiting import wait_until

SHAPE = Shape(steps=4, batch_size=3, num_samples=6)
IDS = {0: [0, 1, 2], 1: [3, 4, 5], 2: [5, 3, 1], 3: [4, 2, 0]}


def said(attempt: int, step: int, rank: int, ids: list[int]) -> dict[str, Any]:
    return {"attempt": attempt, "rank": rank, "step": step, "ids": ids}


def began(attempt: int, step: int) -> list[dict[str, Any]]:
    return [{"attempt": attempt, "rank": rank, "begin": step, "workers": 2} for rank in (0, 1)]


def a_step(attempt: int, step: int) -> list[dict[str, Any]]:
    return [said(attempt, step, 0, IDS[step][:2]), said(attempt, step, 1, IDS[step][2:])]


SEEN = [
    *began(1, 0),
    *(line for step in (0, 1, 2) for line in a_step(1, step)),
    *began(2, 2),
    *(line for step in (2, 3) for line in a_step(2, step)),
]
"""Two workers; step 2 was interrupted and done again."""


def leave(folder: Path) -> Left:
    """What a sound run of two workers leaves, of which one was killed in step 2."""
    record = RunRecord(Storage(folder / "storage"), "run")
    record.claim_identity({"recipe": "a:B"})

    def write(into: Path) -> None:
        (into / "model.safetensors").write_bytes(bytes(range(64)))
        (into / "rest.safetensors").write_bytes(bytes(range(64, 128)))
        (into / "state.json").write_text('{"step": 4}')

    token = record.fence.take()
    token.begin({})
    commit(
        checkpoint_path(record.checkpoints_dir, 4, token.number), write, meta=stamp(step=4, run="x", token=1)
    )
    record.append(
        "start", workers=2, pids=[1, 2], host="h", step=0, target_steps=4, source="fresh", revision=""
    )
    for step in (1, 2, 3, 4):
        record.append("metrics", step=step, values={"loss": 1.0 / step})
    record.append("eval", step=4, split="val", values={"loss": 0.2})
    record.append_end(RunState.FINISHED, step=4)
    (folder / "seen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SEEN))
    (folder / "played.json").write_text(json.dumps({"problem": ""}))
    return Left(folder)


@pytest.fixture
def undisturbed(tmp_path: Path) -> Left:
    return leave(tmp_path / "undisturbed")


@pytest.fixture
def left(tmp_path: Path) -> Left:
    return leave(tmp_path / "left")


def test_a_sound_run_passes(left: Left, undisturbed: Left) -> None:
    assert problems(left, undisturbed, SHAPE) == []


def flip_a_byte(left: Left) -> None:
    path = left.final(4) / "rest.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def commit_other_bits(left: Left) -> None:
    """Whole and verified, and not what the undisturbed run has."""
    final = left.final(4)
    shutil.rmtree(final)

    def write(into: Path) -> None:
        (into / "model.safetensors").write_bytes(bytes(64))

    commit(final, write, meta={})


def lose_the_checkpoint(left: Left) -> None:
    shutil.rmtree(left.final(4))


def edit_seen(left: Left, lines: list[dict[str, Any]]) -> None:
    (left.folder / "seen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def lose_a_sample(left: Left) -> None:
    edit_seen(left, [line for line in SEEN if line != said(2, 3, 1, IDS[3][2:])])


def use_a_sample_twice(left: Left) -> None:
    edit_seen(left, [*SEEN, said(2, 3, 1, [4])])


def interrupt_with_other_samples(left: Left) -> None:
    edit_seen(left, [said(1, 2, 0, [0, 2]) if line == said(1, 2, 0, [5, 3]) else line for line in SEEN])


def begin_apart(left: Left) -> None:
    edit_seen(left, [{**line, "begin": 1} if line == began(2, 2)[1] else line for line in SEEN])


def skip_a_step(left: Left) -> None:
    """Begin after a step that nobody did."""
    edit_seen(left, [line for line in SEEN if line.get("step") != 1])


def leave_a_temporary_file(left: Left) -> None:
    (left.record.dir / ".data.json.0-0-1-1-0.tmp").touch()


def leave_a_temporary_checkpoint(left: Left) -> None:
    (left.record.checkpoints_dir / ".step-0000000003.0-0-1-1-0.tmp").mkdir()


def leave_a_temporary_token(left: Left) -> None:
    (left.record.dir / "fence" / ".000002.json.0-0-1-1-0.tmp").touch()


def leave_tokens(left: Left) -> None:
    left.record.fence.take()


def go_on_elsewhere(left: Left) -> None:
    """Somebody began anew, so that the last checkpoint counts no more."""
    left.record.fence.take().begin({})


def leave_checkpoints(left: Left) -> None:
    for step in (1, 2, 3):
        shutil.copytree(left.final(4), checkpoint_path(left.record.checkpoints_dir, step, 1))


def unfinished(left: Left) -> None:
    left.record.append_end(RunState.STOPPED, step=4)


def finish_early(left: Left) -> None:
    left.record.append_end(RunState.FINISHED, step=3)


def another_loss(left: Left) -> None:
    left.record.append("metrics", step=2, values={"loss": 0.5 + 2**-53})


def another_evaluation(left: Left) -> None:
    left.record.append("eval", step=4, split="val", values={"loss": 0.3})


def an_evaluation_too_many(left: Left) -> None:
    left.record.append("eval", step=3, split="val", values={"loss": 0.3})


def lose_an_evaluation(left: Left) -> None:
    path = left.record.journal_path
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"eval"' not in line))


def not_over(left: Left) -> None:
    (left.folder / "played.json").write_text(json.dumps({"problem": "not over after 90 s"}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip_a_byte, "is damaged: the content of rest.safetensors"),
        (commit_other_bits, "other bits"),
        (lose_the_checkpoint, "No such file"),
        (lose_a_sample, "steps 2 to 3: missing [0]"),
        (use_a_sample_twice, "steps 2 to 3: missing [], more than once [4]"),
        (interrupt_with_other_samples, "step 2 had other samples in attempt 1"),
        (begin_apart, "in attempt 2 workers began at different steps: [1, 2]"),
        (skip_a_step, "steps 0 to 1: missing [3, 4, 5]"),
        (leave_a_temporary_file, "left behind: .data.json"),
        (leave_a_temporary_checkpoint, "left behind: checkpoints/.step-0000000003"),
        (leave_a_temporary_token, "left behind: fence/.000002"),
        (leave_tokens, "more tokens than the last holder's are left: 000001.json, 000002.json"),
        (go_on_elsewhere, "No such file"),
        (leave_checkpoints, "4 checkpoints are kept"),
        (unfinished, "the run is stopped at step 4"),
        (finish_early, "not finished at step 4"),
        (another_loss, "metrics (2, 'train'): 0.5000000000000001"),
        (another_evaluation, "eval (4, 'val')"),
        (an_evaluation_too_many, "eval [(3, 'val')] are not the undisturbed run's"),
        (lose_an_evaluation, "not evaluated: [(4, 'val')]"),
        (not_over, "not over after 90 s"),
    ],
)
def test_one_damage_is_one_problem(
    left: Left, undisturbed: Left, damage: Callable[[Left], None], says: str
) -> None:
    damage(left)
    (problem,) = problems(left, undisturbed, SHAPE)
    assert says in problem


def test_the_manifest_counts_too(left: Left, undisturbed: Left) -> None:
    (left.final(4) / MANIFEST).unlink()
    assert "never committed" in problems(left, undisturbed, SHAPE)[0]


def test_a_process_that_is_left_is_named() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    leader = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, process_group=0)
    try:
        wait_until(
            lambda: "-c input()" in str(check_processes(leader.pid)), "the child has its own command line"
        )
    finally:
        leader.communicate()
    assert check_processes(leader.pid) == []


def test_a_step_belongs_to_the_last_attempt_that_began_before_it() -> None:
    assert completed_by(SEEN, SHAPE) == [1, 1, 2, 2]
    assert completed_by([*began(1, 1)], SHAPE) == "the first attempt did not begin at step 0: [(1, 1)]"
    assert completed_by([], SHAPE) == "the first attempt did not begin at step 0: []"


def test_an_interrupted_step_is_not_lost_and_one_before_it_is() -> None:
    assert num_lost(SEEN) == 0
    assert num_lost([line if line.get("begin") != 2 else {**line, "begin": 0} for line in SEEN]) == 2
