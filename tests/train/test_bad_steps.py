"""A NaN: the run fails, or the step's update is left out and stays left out, whoever goes on with the run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal
from fleet import KILLED, Fleet, Group
from shoal.errors import CorruptError, RecipeError
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from shoal.train import group as room
from shoal.train.bad_steps import MAX_BAD_STEPS, MAX_IN_A_ROW, BadSteps, OnNan, read_bad_steps
from shoal.train.engine import train_worker
from shoal.train.order import DataOrder
from shoal.train.seeds import derive_seed
from shoal.train.spec import RunSpec
from toy import Toy
from toy_elastic import samples_by_step
from trainees import fingerprint_of

STEPS = 24
EXACT: dict[str, Any] = {"batch_size": 14, "shards": 5, "steps": STEPS}
POISON = [6, 15]


@pytest.fixture(scope="module")
def skipped(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bits of an exact run of one worker that skipped the steps of `POISON`."""
    storage = tmp_path_factory.mktemp("skipped")
    group = Group(storage=str(storage), name="alone", workers=1, poison=POISON, on_nan="skip", **EXACT)
    record = fleet.train_elastic(group)
    assert record.state() is RunState.FINISHED
    order = DataOrder(70, 14, derive_seed(0, "order"))
    assert [(bad.step, bad.samples) for bad in read_bad_steps(record.dir)] == [
        (step, order.samples(step)) for step in POISON
    ]
    events = record.events(("bad_step",))
    assert [(e["step"], e["num_samples"], e["action"]) for e in events] == [(s, 14, "skip") for s in POISON]
    return fingerprint_of(storage, "alone", STEPS)


class Recalling(Toy):
    """Notes the whole state before and after each step; what it is asked to break in step 5."""

    breaks = "loss"

    def train(self, session: shoal.Session) -> None:
        session.model[0].weight.register_hook(
            lambda grad: grad * math.inf if self.is_bad(session, "gradient") else grad
        )
        for batch in session.batches():
            before = _state(session)
            loss = session.loss(batch)
            session.backward(loss + math.inf if self.is_bad(session, "loss") else loss)
            step = session.steps_done
            session.step()
            self.seen[step] = (before, _state(session), session.optimizer.param_groups[0]["lr"])

    def is_bad(self, session: shoal.Session, what: str) -> bool:
        return session.steps_done == 5 and what == self.breaks


def _state(session: shoal.Session) -> list[torch.Tensor]:
    momenta = [state["momentum_buffer"] for state in session.optimizer.state.values()]
    return [tensor.clone() for tensor in [*session.model.state_dict().values(), *momenta]]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("shards", [None, 3])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_but_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, shards: int | None
) -> None:
    monkeypatch.setattr(Recalling, "breaks", what)
    monkeypatch.setattr(Recalling, "seen", {}, raising=False)
    spec = RunSpec(
        recipe=Recalling(),
        name="run",
        storage=Storage(tmp_path),
        target_steps=8,
        shards=shards,
        on_nan="skip",
    )
    train_worker(spec, room.Group.alone())
    record = RunRecord(spec.storage, spec.name)
    assert record.state() is RunState.FINISHED
    assert [_same(before, after) for before, after, _ in Recalling.seen.values()] == [
        step == 5 for step in range(8)
    ]
    rates = [rate for *_, rate in Recalling.seen.values()]
    assert rates == sorted(set(rates), reverse=True), "step k has the rate of step k"
    (bad,) = read_bad_steps(record.dir)
    assert bad.reason == ("the loss is inf" if what == "loss" else "a gradient is NaN or infinite")


def test_by_default_a_nan_ends_the_run_and_says_how_to_go_on(fleet: Fleet, tmp_path: Path) -> None:
    group = Group(storage=str(tmp_path), name="run", workers=2, poison=[3], steps=8, batch_size=14)
    fleet.train(group)
    record = RunRecord(Storage(tmp_path), "run")
    assert record.state() is RunState.FAILED
    assert "step 3: the loss is nan" in record.events(("end",))[0]["error"]
    assert "--on-nan skip" in record.events(("end",))[0]["error"]


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_skips_to_the_same_bits(
    fleet: Fleet, skipped: str, tmp_path: Path, workers: int
) -> None:
    group = Group(storage=str(tmp_path), name="run", workers=workers, poison=POISON, on_nan="skip", **EXACT)
    assert fleet.train_elastic(group).state() is RunState.FINISHED
    assert fingerprint_of(tmp_path, "run", STEPS) == skipped


@pytest.mark.parametrize("shards", [5, None])
def test_killed_after_a_skip_it_is_skipped_again_though_nothing_is_wrong_any_more(
    fleet: Fleet, skipped: str, tmp_path: Path, shards: int | None
) -> None:
    sizes = {"batch_size": 14, "shards": shards, "steps": STEPS}
    group = Group(storage=str(tmp_path), name="run", workers=2, poison=POISON, on_nan="skip", **sizes)
    assert fleet.train(replace(group, die_at_step=18)) == [KILLED] * 2
    record = fleet.train_elastic(replace(group, poison=[], workers=3 if shards else 2, on_nan="fail"))
    assert record.state() is RunState.FINISHED
    assert [start["step"] for start in record.events(("start",))] == [0, 0]
    assert set(POISON).isdisjoint(samples_by_step(record)), "it is not even loaded"
    if shards is None:
        whole = fleet.train_elastic(replace(group, name="whole"))
        assert fingerprint_of(tmp_path, "run", STEPS) == fingerprint_of(tmp_path, "whole", STEPS)
        assert whole.metrics_frame()["val_loss"].dropna().equals(record.metrics_frame()["val_loss"].dropna())
    else:
        assert fingerprint_of(tmp_path, "run", STEPS) == skipped


def test_a_rollback_begins_at_the_last_checkpoint_and_leaves_the_batch_out(
    fleet: Fleet, skipped: str, tmp_path: Path
) -> None:
    group = Group(storage=str(tmp_path), name="run", workers=2, on_nan="rollback", resizes={3: 2}, **EXACT)
    assert fleet.train(group) == [0, 0]
    record = fleet.train_elastic(replace(group, resizes={}, poison=POISON))
    assert [start["step"] for start in record.events(("start",))] == [0, 4, 4, 4]
    assert record.state() is RunState.FINISHED
    assert fingerprint_of(tmp_path, "run", STEPS) == skipped


@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
def test_a_model_that_has_diverged_ends_the_run(tmp_path: Path, on_nan: OnNan) -> None:
    class Diverged(Toy):
        def train(self, session: shoal.Session) -> None:
            for batch in session.batches():
                session.backward(session.loss(batch) * (math.nan if session.steps_done >= 5 else 1))
                session.step()

    spec = RunSpec(recipe=Diverged(), name="run", storage=Storage(tmp_path), target_steps=60, on_nan=on_nan)
    train_worker(spec, room.Group.alone())
    record = RunRecord(spec.storage, spec.name)
    assert record.state() is RunState.FAILED
    end = record.events(("end",))[-1]
    assert end["error_type"] == "RecipeError"
    assert f"the loss is nan at step {5 + MAX_IN_A_ROW}, and steps 5-{5 + MAX_IN_A_ROW}" in end["error"]
    assert str(record.dir / "bad_steps.json") in end["error"]


def test_bad_steps_are_bounded_also_when_they_are_not_neighbours(tmp_path: Path) -> None:
    bad = BadSteps(tmp_path)
    for step in range(0, 2 * MAX_BAD_STEPS, 2):
        bad.add(step, samples=range(20_000), reason="the loss is nan")
    bad.add(0, samples=[1], reason="again")
    with pytest.raises(RecipeError, match=r"steps 0, 2, 4, .* 198, 201 were"):
        bad.add(201, samples=[1], reason="the loss is nan")
    bad.write()
    assert [len(each.samples) for each in read_bad_steps(tmp_path)[:2]] == [1, 10_000]


@pytest.mark.parametrize("content", [{}, [{"step": 1}], [3]])
def test_a_damaged_list_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "bad_steps.json").write_text(json.dumps(content))
    with pytest.raises(CorruptError, match="it lists no steps"):
        read_bad_steps(tmp_path)
