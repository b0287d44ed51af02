"""Going on from another run's checkpoint: its state is inherited, the new fields' hyperparameters win."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from committed import folder_of
from shoal.storage import Storage, verify
from shoal.tracking import RunRecord, RunState
from shoal.train.adopt import adopt_checkpoint
from shoal.train.checkpoints import Loaded, read_checkpoint
from shoal.train.engine import train_worker
from shoal.train.export import lineage_of
from shoal.train.group import Group
from shoal.train.inherit import inherit
from shoal.train.run import Run
from shoal.train.spec import RunSpec
from toy import Toy


class Tuned(Toy):
    """More of its optimizer and schedule are fields."""

    momentum: float = 0.9
    period: int = 100
    width: int = 33

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, self.width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(self.width, 2))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.period)


def spec_of(tmp_path: Path, name: str, recipe: shoal.Recipe, steps: int = 40) -> RunSpec:
    return RunSpec(
        recipe=recipe,
        name=name,
        storage=Storage(tmp_path),
        target_steps=steps,
        checkpoint_at_eval=True,
        checkpoint_every_s=1e9,
    )


def train(spec: RunSpec, **kwargs: Any) -> RunRecord:
    record = RunRecord(spec.storage, spec.name)
    record.claim_identity(spec.identity())
    train_worker(spec, Group.alone(), **kwargs)
    return record


def go_on(tmp_path: Path, recipe: shoal.Recipe, source: RunRecord, steps: int = 60) -> RunRecord:
    spec = spec_of(tmp_path, "next", recipe, steps)
    adopted = adopt_checkpoint(source, RunRecord(spec.storage, spec.name))
    return train(replace(spec, source=adopted))


def loaded(record: RunRecord, step: int) -> Loaded:
    return read_checkpoint(folder_of(record, step))


def test_a_copy_that_stands_beside_the_checkpoints_is_not_adopted(tmp_path: Path) -> None:
    source = train(spec_of(tmp_path, "source", Tuned()))
    newest = max(source.checkpoints_dir.glob("step-*"))
    shutil.copytree(newest, newest.with_name(f"{newest.name}.bak"))
    target = RunRecord(Storage(tmp_path), "next")
    adopt_checkpoint(source, target)
    assert [path.name for path in target.checkpoints_dir.iterdir()] == ["step-0000000040"]


def test_with_the_same_fields_it_is_the_run_it_came_from(tmp_path: Path) -> None:
    whole = train(spec_of(tmp_path, "whole", Tuned(), steps=60))
    source = train(spec_of(tmp_path, "source", Tuned()))
    found, wanted = loaded(go_on(tmp_path, Tuned(), source), 60), loaded(whole, 60)
    assert all(torch.equal(found.model[name], wanted.model[name]) for name in wanted.model)
    assert found.optimizer["param_groups"] == wanted.optimizer["param_groups"]
    assert found.scheduler == wanted.scheduler


def test_the_new_fields_win_and_the_schedule_goes_on(tmp_path: Path) -> None:
    source = train(spec_of(tmp_path, "source", Tuned()))
    record = go_on(tmp_path, Tuned(lr=0.2, momentum=0.5, period=80), source)
    assert [(e["step"], e["source"]) for e in record.events(("start",))] == [(40, "adopted")]
    state = loaded(record, 60)
    group = state.optimizer["param_groups"][0]
    assert (group["initial_lr"], group["momentum"]) == (0.2, 0.5)
    assert (state.scheduler["base_lrs"], state.scheduler["T_max"]) == ([0.2], 80)
    assert state.scheduler["last_epoch"] == 60
    # The source's cosine of period 100 had come to step 40; from there this one goes on with its own period.
    lr = 0.2 * (1 + math.cos(math.pi * 40 / 100)) / 2
    for step in range(41, 61):
        lr *= (1 + math.cos(math.pi * step / 80)) / (1 + math.cos(math.pi * (step - 1) / 80))
    assert group["lr"] == pytest.approx(lr, rel=1e-9)


def test_killed_before_its_own_first_checkpoint_it_begins_from_the_source_again(tmp_path: Path) -> None:
    source = train(spec_of(tmp_path, "source", Toy()))
    undisturbed = go_on(tmp_path, Toy(lr=0.2), source)
    wanted = loaded(undisturbed, 60)

    spec = spec_of(tmp_path, "killed", Toy(lr=0.2, eval_every=20), 60)
    spec = replace(spec, source=adopt_checkpoint(source, RunRecord(spec.storage, spec.name)))

    class Dies(Toy):
        def train(self, session: shoal.Session) -> None:
            for batch in session.batches():
                session.backward(session.loss(batch))
                session.step()
                raise SystemExit  # as a killed process: nothing is recorded

    RunRecord(spec.storage, spec.name).claim_identity(spec.identity())
    with pytest.raises(SystemExit):
        train_worker(replace(spec, recipe=Dies(lr=0.2)), Group.alone())
    record = train(spec)
    assert [(e["step"], e["source"]) for e in record.events(("start",))] == [(40, "adopted")] * 2
    found = loaded(record, 60)
    assert all(torch.equal(found.model[name], wanted.model[name]) for name in wanted.model)
    assert found.optimizer["param_groups"] == wanted.optimizer["param_groups"]


def test_its_own_checkpoints_are_resumed_from_as_ever(tmp_path: Path) -> None:
    source = train(spec_of(tmp_path, "source", Toy()))
    go_on(tmp_path, Toy(lr=0.2), source, steps=60)
    spec = spec_of(tmp_path, "next", Toy(lr=0.2), 80)
    identity = RunRecord(spec.storage, "next").identity()
    assert identity is not None
    from shoal.train.spec import Source

    record = train(replace(spec, source=Source(**identity["source"])))
    assert [(e["step"], e["source"]) for e in record.events(("start",))] == [
        (40, "adopted"),
        (60, "checkpoint"),
    ]


def test_weights_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    record = go_on(tmp_path, Tuned(width=34), train(spec_of(tmp_path, "source", Tuned())))
    assert record.state() is RunState.FAILED
    error = record.events(("end",))[-1]["error"]
    assert "can search only fields that leave the model's shape alone" in error
    assert "size mismatch for 0.weight" in error


def test_a_copy_that_is_damaged_is_never_replaced_by_fresh_weights(tmp_path: Path) -> None:
    source = train(spec_of(tmp_path, "source", Toy()))
    spec = spec_of(tmp_path, "next", Toy(lr=0.2), 60)
    target = RunRecord(spec.storage, "next")
    spec = replace(spec, source=adopt_checkpoint(source, target))
    (folder_of(target, 40) / "model.safetensors").write_bytes(b"x")
    record = train(spec)
    assert record.state() is RunState.FAILED
    assert "step 40 of run 'source'" in record.events(("end",))[-1]["error"]


def test_a_damaged_checkpoint_is_not_adopted(tmp_path: Path) -> None:
    source = train(spec_of(tmp_path, "source", Toy()))
    (folder_of(source, 40) / "model.safetensors").write_bytes(b"x")
    target = RunRecord(Storage(tmp_path), "next")
    found = adopt_checkpoint(source, target)
    assert (found.run, found.step) == ("source", 20)
    assert found.digest == verify(folder_of(target, 20)).digest


def test_another_runs_checkpoint_is_not_adopted(tmp_path: Path) -> None:
    source = train(spec_of(tmp_path, "source", Toy()))
    other = train(spec_of(tmp_path, "other", Toy(lr=0.1), steps=60))
    for step in (40, 60):
        theirs = folder_of(other, step)
        planted = source.checkpoints_dir / theirs.name
        shutil.rmtree(planted, ignore_errors=True)
        shutil.copytree(theirs, planted)
    target = RunRecord(Storage(tmp_path), "next")
    assert adopt_checkpoint(source, target).step == 20
    assert [path.name for path in target.checkpoints_dir.iterdir()] == ["step-0000000020"]


def test_what_was_adopted_is_adopted_again_before_it_has_trained_on(tmp_path: Path) -> None:
    source = train(spec_of(tmp_path, "source", Toy()))
    middle = RunRecord(Storage(tmp_path), "middle")
    spec = spec_of(tmp_path, "middle", Toy(lr=0.2), 60)
    first = adopt_checkpoint(source, middle)
    middle.claim_identity(replace(spec, source=first).identity())
    last = adopt_checkpoint(middle, RunRecord(Storage(tmp_path), "next"))
    assert last == replace(first, run="middle")
    spec = replace(spec_of(tmp_path, "next", Toy(lr=0.3), 60), source=last)
    assert [e["source"] for e in train(spec).events(("start",))] == ["adopted"]


def test_lineage_names_the_source(tmp_path: Path) -> None:
    source = train(spec_of(tmp_path, "source", Toy()))
    record = go_on(tmp_path, Toy(lr=0.2), source)
    lineage = lineage_of(Run(record), folder_of(record, 60))
    assert lineage.source is not None
    assert (lineage.source["run"], lineage.source["step"]) == ("source", 40)
    assert "source" not in lineage_of(Run(source), folder_of(source, 40)).as_dict()


def test_every_evaluation_is_reported_with_its_checkpoint_committed(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "run", Toy(eval_every=5))
    seen = []

    def look(step: int, values: Any) -> None:
        seen.append((step, verify(folder_of(RunRecord(spec.storage, "run"), step)).meta["step"]))

    train(spec, on_eval=look)
    assert seen == [(step, step) for step in range(5, 41, 5)]


def test_what_did_not_change_is_inherited_and_what_did_is_not() -> None:
    was = {"lr": 0.1, "betas": (0.9, 0.99), "d": 1e-6, "base_lrs": [0.1]}
    saved = {"lr": 0.05, "betas": (0.9, 0.99), "d": 0.3, "base_lrs": [0.1], "state": {0: 1}}
    assert inherit(saved, was, was) == saved
    now = {"lr": 0.2, "betas": (0.8, 0.99), "d": 1e-6, "base_lrs": [0.2]}
    assert inherit(saved, was, now) == {
        "lr": 0.1,  # half way down a schedule, of twice as much
        "betas": (0.8, 0.99),
        "d": 0.3,
        "base_lrs": [0.2],
        "state": {0: 1},
    }
    assert inherit({"lr": 0.1}, {"lr": 0.1}, {"lr": 0.3}) == {"lr": 0.3}
    assert inherit({"lr": 0.1}, {"lr": 0.0}, {"lr": 0.3}) == {"lr": 0.3}
