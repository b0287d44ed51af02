"""The same recipe, divided in other ways among the workers: the same checkpoint, and the same training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fleet import KILLED, RAISED, Fleet, Group
from shoal.models import load_tensors
from shoal.tracking import RunRecord, RunState
from shoal.train.checkpoints import MODEL_FILE, REST_FILE
from shoal.train.sharded import rows_of
from shoal.train.spec import Strategy
from toy_elastic import samples_by_step
from trainees import fingerprint_of, folder_of

STEPS = 24
TWO_MACHINES = ["a", "a", "b", "b"]
LIMIT = 1e-5
"""How far weights may differ by the grouping of sums alone; measured after 100 steps: 3e-7."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


def group(storage: Path, name: Strategy | str, **changes: object) -> Group:
    """Three workers; a batch of 13 gives them unequal parts, and 30 validation samples unequal numbers of batches."""
    return replace(Group(storage=str(storage), name=name, workers=3, steps=STEPS, batch_size=13), **changes)


def tensors_of(record: RunRecord) -> dict[str, torch.Tensor]:
    folder = folder_of(record, STEPS)
    return {
        f"{file} {name}": tensor
        for file in (MODEL_FILE, REST_FILE)
        for name, tensor in load_tensors(folder / file).items()
    }


def assert_alike(one: RunRecord, other: RunRecord) -> None:
    """Both ended with the same tensors, but for the grouping of sums, and measured the same on the way."""
    assert one.state() is other.state() is RunState.FINISHED
    was, now = tensors_of(one), tensors_of(other)
    assert was.keys() == now.keys()
    for name, tensor in was.items():
        torch.testing.assert_close(
            now[name], tensor, rtol=LIMIT, atol=LIMIT, msg=lambda text, n=name: f"{n}: {text}"
        )
    for kind in ("metrics", "eval"):
        values = [[event["values"] for event in run.events((kind,))] for run in (one, other)]
        assert [set(v) for v in values[0]] == [set(v) for v in values[1]]
        for before, after in zip(*values, strict=True):
            assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def ddp(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return fleet.train_elastic(group(tmp_path_factory.mktemp("ddp"), "ddp"))


def test_a_divided_run_learns_what_a_whole_one_does(fleet: Fleet, ddp: RunRecord, tmp_path: Path) -> None:
    divided = fleet.train_elastic(group(tmp_path, "fsdp", strategy="fsdp"))
    assert_alike(ddp, divided)
    again = fleet.train_elastic(group(tmp_path, "again", strategy="fsdp", resizes={9: 3}))
    assert len(again.events(("start",))) == 2
    assert fingerprint_of(tmp_path, "again", STEPS) == fingerprint_of(tmp_path, "fsdp", STEPS)


def test_hybrid_divides_within_a_machine(fleet: Fleet, tmp_path: Path) -> None:
    whole = fleet.train_elastic(group(tmp_path, "ddp", workers=4))
    hybrid = fleet.train_elastic(
        group(tmp_path, "hybrid", workers=4, strategy="hybrid", machines=TWO_MACHINES)
    )
    assert_alike(whole, hybrid)


def test_a_divided_run_accumulates_gradients_as_a_whole_one_does(fleet: Fleet, tmp_path: Path) -> None:
    whole, divided = (
        fleet.train_elastic(group(tmp_path, name, strategy=name, batch_size=26, micro_batch=4))
        for name in ("ddp", "fsdp")
    )
    assert_alike(whole, divided)


def test_a_run_goes_on_under_any_strategy(fleet: Fleet, ddp: RunRecord, tmp_path: Path) -> None:
    first = group(tmp_path, "run", strategy="fsdp", resizes={7: 3})
    assert fleet.train(first) == [0] * 3
    assert fleet.train(replace(first, strategy="ddp", resizes={15: 3})) == [0] * 3
    record = fleet.train_elastic(replace(first, strategy="hybrid", resizes={}))
    assert_alike_to_the_end(ddp, record)
    warnings = [event["message"] for event in record.events(("warning",))]
    assert any("strategy was fsdp in the checkpoint and is ddp now" in message for message in warnings)


def assert_alike_to_the_end(one: RunRecord, other: RunRecord) -> None:
    was, now = tensors_of(one), tensors_of(other)
    assert all(torch.allclose(now[name], tensor, rtol=LIMIT, atol=LIMIT) for name, tensor in was.items())
    assert samples_by_step(other) == samples_by_step(one)


def test_who_loses_a_part_of_the_state_goes_on_from_the_last_checkpoint(
    fleet: Fleet, ddp: RunRecord, tmp_path: Path
) -> None:
    dying = group(tmp_path, "run", strategy="fsdp", resizes={9: 3})
    assert fleet.train(dying) == [0] * 3
    dying = replace(dying, resizes={}, die_at_step=14, who_dies=[1])
    assert fleet.train(dying) == [RAISED, KILLED, RAISED], "the others lost a peer, and say so"
    record = fleet.train_elastic(replace(dying, die_at_step=None))
    assert [event["step"] for event in record.events(("start",))] == [0, 10, 10]
    assert [event["state"] for event in record.events(("end",))] == [RunState.FINISHED]
    was, now = tensors_of(ddp), tensors_of(record)
    assert all(torch.allclose(now[name], tensor, rtol=LIMIT, atol=LIMIT) for name, tensor in was.items())


def test_a_gradient_that_one_worker_alone_sees_as_nan_is_left_out_by_all(
    fleet: Fleet, tmp_path: Path
) -> None:
    runs = [
        fleet.train_elastic(group(tmp_path, name, strategy=name, poison=[5], on_nan="skip"))
        for name in ("ddp", "fsdp")
    ]
    assert [event["step"] for event in runs[1].events(("bad_step",))] == [5]
    assert_alike(*runs)


@pytest.mark.parametrize(
    ("machines", "rows"),
    [
        (["a", "a", "b", "b"], [[0, 1], [2, 3]]),
        (["a", "b", "a", "b"], [[0, 2], [1, 3]]),
        (["a", "a", "a", "a", "b", "b"], [[0, 1], [2, 3], [4, 5]]),
        (["a", "a", "a", "b", "b"], [[0], [1], [2], [3], [4]]),
        (["a", "a", "a"], [[0, 1, 2]]),
    ],
)
def test_rows_are_of_one_machine_and_of_one_length(machines: list[str], rows: list[list[int]]) -> None:
    assert rows_of(machines) == rows
