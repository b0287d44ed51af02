"""A step that does not fit into memory: the same batch in smaller parts, on every rank, from the same boundary on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shoal
from fleet import RAISED, Fleet, Group
from shoal.errors import CorruptError
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from shoal.train import group as room
from shoal.train.checkpoints import read_checkpoint
from shoal.train.engine import train_worker
from shoal.train.out_of_memory import (
    halved,
    is_out_of_memory,
    largest_part,
    num_parts,
    read_micro_batch,
)
from shoal.train.spec import RunSpec
from shoal.train.stamp import checkpoint_at
from toy import Toy
from toy_elastic import samples_by_step

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_counts_as_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@given(batch=st.integers(1, 200), workers=st.integers(1, 6))
def test_halving_ends_at_a_sample_or_two_and_never_leaves_a_part_empty(batch: int, workers: int) -> None:
    parts, samples = 1, None
    workers = min(workers, batch)
    while (fewer := halved(batch, workers, parts)) is not None:
        more = num_parts(batch, workers, fewer)
        assert more > parts
        assert largest_part(batch, workers, more) <= fewer
        parts, samples = more, fewer
    assert largest_part(batch, workers, parts) <= (1 if batch % workers == 0 else 2)
    assert parts * workers <= batch
    assert num_parts(batch, workers, samples) == parts, "a restart begins there"


class Small(Toy):
    """A model whose gradient does not depend on how a batch is divided; more than ``fits`` samples do not fit."""

    fits: int = 12
    where: str = "forward"

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def train(self, session: shoal.Session) -> None:
        def allocate(where: str, batch: Any) -> None:
            if where == self.where and session.steps_done >= 3 and len(batch[0]) > self.fits:
                raise torch.OutOfMemoryError("no more")

        session.optimizer.register_step_post_hook(lambda *_: allocate("optimizer", batch))
        for batch in session.batches():
            allocate("forward", batch)
            session.backward(session.loss(batch))
            allocate("backward", batch)
            session.step()


def train(tmp_path: Path, recipe: shoal.Recipe, *, steps: int = 8, **changes: Any) -> RunRecord:
    spec = RunSpec(recipe=recipe, name="run", storage=Storage(tmp_path), target_steps=steps, **changes)
    train_worker(spec, room.Group.alone())
    return RunRecord(spec.storage, spec.name)


def weights_of(record: RunRecord, step: int = 8) -> dict[str, torch.Tensor]:
    folder = checkpoint_at(record, step)
    assert folder is not None
    return read_checkpoint(folder).model


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_the_batch_is_taken_in_smaller_parts_with_the_same_weights(tmp_path: Path, where: str) -> None:
    whole = weights_of(train(tmp_path / "whole", Small()))
    record = train(tmp_path, Small(fits=4, where=where))
    assert record.state() is RunState.FINISHED
    assert [event["samples"] for event in record.events(("out_of_memory",))] == [6, 3]
    # An update that may be half made is not gone on from: there is no checkpoint before, so it begins anew.
    again = [0, 0] if where == "optimizer" else [3, 3]
    assert [start["step"] for start in record.events(("start",))] == [0, *again]
    for name, tensor in weights_of(record).items():
        # Of a mean over 12 samples, which is added up in another order.
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)
    longer = train(tmp_path, Small(fits=4, where=where), steps=12)
    assert longer.state() is RunState.FINISHED
    assert len(longer.events(("out_of_memory",))) == 2, "it is remembered"


def test_what_a_forward_pass_left_in_buffers_is_not_committed(tmp_path: Path) -> None:
    """One worker keeps no copy of its BatchNorm's means, so it goes back to its last checkpoint."""

    class Normed(Small):
        def build_model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))

    record = train(tmp_path, Normed(fits=6, where="backward", eval_every=2))
    assert record.state() is RunState.FINISHED
    assert [start["step"] for start in record.events(("start",))] == [0, 2]


def test_a_sample_that_does_not_fit_ends_the_run(tmp_path: Path) -> None:
    record = train(tmp_path, Small(fits=0))
    assert record.state() is RunState.FAILED
    assert "step 3: out of memory with 1 sample(s) at a time" in record.events(("end",))[0]["error"]
    assert [event["samples"] for event in record.events(("out_of_memory",))] == [6, 3, 2, 1]


def test_an_exact_run_says_to_take_more_shards(tmp_path: Path) -> None:
    record = train(tmp_path, Small(fits=2), shards=4)
    (end,) = record.events(("end",))
    assert end["error_type"] == "RecipeError"
    assert "here 3 samples at most: start another run with more of them (shards=8)" in end["error"]
    assert read_micro_batch(record.dir) is None


def test_a_damaged_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "micro_batch.json").write_text('{"samples": 0}')
    with pytest.raises(CorruptError, match="names no number of samples"):
        read_micro_batch(tmp_path)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.mark.parametrize("memory_in", ["forward", "backward"])
def test_one_rank_without_memory_has_all_take_smaller_parts(
    fleet: Fleet, tmp_path: Path, memory_in: str
) -> None:
    group = Group(
        storage=str(tmp_path), name="run", workers=2, steps=8, batch_size=14, memory=4, memory_in=memory_in
    )
    assert fleet.train(group) == [0, 0]
    record = RunRecord(Storage(tmp_path), "run")
    assert record.state() is RunState.FINISHED
    assert [(e["step"], e["samples"]) for e in record.events(("out_of_memory",))] == [(5, 4)]
    assert [start["step"] for start in record.events(("start",))] == [0, 5], "no step is lost"
    seen = samples_by_step(record)
    assert {step: len(set(samples)) for step, samples in seen.items()} == dict.fromkeys(range(5, 8), 14)


def test_too_late_to_tell_the_others_it_counts_as_a_lost_peer(fleet: Fleet, tmp_path: Path) -> None:
    group = Group(
        storage=str(tmp_path), name="run", workers=2, steps=8, batch_size=14, memory=4, memory_in="optimizer"
    )
    assert fleet.train(group) == [RAISED, RAISED]
    record = RunRecord(Storage(tmp_path), "run")
    assert read_micro_batch(record.dir) == 4
    assert fleet.train(replace(group)) == [0, 0]
    assert record.state() is RunState.FINISHED
    assert [start["step"] for start in record.events(("start",))] == [0, 6], "its peer had the whole step"
