"""The engine in this process, one worker: how runs end, resume and refuse."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import shoal
from committed import folder_of
from shoal.errors import CorruptError, PeerLost, RecipeError, StorageError, SupersededError
from shoal.recipe import maximize
from shoal.storage import MANIFEST, Storage, commit, reading, verify
from shoal.storage.owner import Owner
from shoal.tracking import Doing, RunRecord, RunState, timeline_of
from shoal.train import boundary, cadence, checkpoint_writer, checkpoints
from shoal.train.driver import prepare
from shoal.train.engine import train_worker
from shoal.train.export import write_run_package
from shoal.train.group import Group
from shoal.train.run import Run
from shoal.train.spec import RunSpec, digest_of
from shoal.train.stamp import checkpoint_at, checkpoint_folders, checkpoint_path, position_of, step_of
from toy import Toy
from waiting import DEADLINE_S, wait_until


def spec_of(tmp_path: Path, recipe: shoal.Recipe | None = None, **changes: Any) -> RunSpec:
    spec = RunSpec(recipe=recipe or Toy(), name="run", storage=Storage(tmp_path), target_steps=60, keep=2)
    return replace(spec, **changes)


def train(spec: RunSpec, **kwargs: Any) -> RunRecord:
    train_worker(spec, Group.alone(), **kwargs)
    return RunRecord(spec.storage, spec.name)


def error_of(record: RunRecord) -> str:
    assert record.state() == RunState.FAILED
    return str(record.events(("end",))[-1]["error"])


def weights_of(record: RunRecord, step: int) -> dict[str, torch.Tensor]:
    return checkpoints.read_checkpoint(folder_of(record, step)).model


def test_a_run_records_what_happened_and_learns(tmp_path: Path) -> None:
    seen: list[int] = []
    record = train(spec_of(tmp_path), on_eval=lambda step, values: seen.append(step))
    assert record.state() == RunState.FINISHED
    assert seen == [20, 40, 60]
    frame = record.metrics_frame()
    assert frame["val_accuracy"].dropna().iloc[-1] > 0.8
    assert {"loss", "samples_per_s", "lr", "val_loss"} <= set(frame.columns)
    assert [event["kind"] for event in record.events(("start", "end"))] == ["start", "end"]
    assert [event["step"] for event in record.events(("first_step",))] == [1]
    assert all(event["seconds"] > 0 for event in record.events(("eval",)))
    assert all(event["pause_s"] > 0 for event in record.events(("checkpoint",)))
    timeline = timeline_of(record.events())
    assert timeline.useful_s < timeline.wall_s - timeline.seconds[Doing.EVALUATING]
    assert timeline.steps_lost == 0


class Declining(Toy):
    """Best at the first look, by decree."""

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"accuracy": -float(model[0].weight.abs().sum())}

    def train(self, session: shoal.Session) -> None:
        for batch in session.batches():
            session.backward(session.loss(batch))
            with torch.no_grad():
                session.model[0].weight *= 1.05
            session.step()


def test_a_peer_lost_between_an_evaluation_and_its_checkpoint_costs_no_best_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(self: boundary.RunBoundary) -> None:
        raise PeerLost("gone")

    spec = spec_of(tmp_path, Declining())  # its best is at the first look, step 20
    RunRecord(spec.storage, spec.name).claim_identity(spec.identity())
    with monkeypatch.context() as patch:
        patch.setattr(boundary.RunBoundary, "_wait_written", lose)
        with pytest.raises(PeerLost):
            train(spec)
    record = train(spec)
    assert record.events(("start",))[-1]["step"] == 20
    assert folder_of(record, 20).exists(), "the best one is kept beside the newest two"
    assert step_of(Run(record).best_checkpoint()) == 20


@pytest.mark.parametrize("step", [20, 60])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_peer_lost_in_an_evaluation_costs_no_evaluation(
    step: int, is_recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its line was written or not: what survivors committed knows nothing of the values."""
    evaluate = boundary.RunBoundary._evaluate

    def lose(self: boundary.RunBoundary, session: shoal.Session) -> dict[str, float]:
        if session.steps_done < step or is_recorded:
            values = evaluate(self, session)
        if session.steps_done == step:
            raise PeerLost("gone")
        return values

    undisturbed = train(spec_of(tmp_path, Declining(), name="undisturbed"))
    spec = spec_of(tmp_path, Declining())  # its best is at the first look, step 20
    RunRecord(spec.storage, spec.name).claim_identity(spec.identity())
    with monkeypatch.context() as patch:
        patch.setattr(boundary.RunBoundary, "_evaluate", lose)
        with pytest.raises(PeerLost):
            train(spec)
    told: list[int] = []
    record = train(spec, on_eval=lambda step, values: told.append(step))
    assert told == [at for at in (20, 40, 60) if at >= step]
    found, expected = ({e["step"]: e["values"] for e in r.events(("eval",))} for r in (record, undisturbed))
    assert found == expected
    assert step_of(Run(record).best_checkpoint()) == 20
    kept, expected_kept = (
        {step_of(path) for path in r.checkpoints_dir.iterdir()} for r in (record, undisturbed)
    )
    assert kept == expected_kept


class LosesAtOnce(Group):
    """A peer is lost before anything is shared."""

    def share(self, value: Any) -> Any:
        raise PeerLost("gone")


def test_a_survivor_that_held_the_lock_does_not_lock_itself_out(tmp_path: Path) -> None:
    with pytest.raises(PeerLost):
        train_worker(spec_of(tmp_path), LosesAtOnce(0, 1, torch.device("cpu")))
    assert train(spec_of(tmp_path, target_steps=2)).state() == RunState.FINISHED


def test_a_run_is_private_also_in_a_storage_folder_that_is_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(0o022)
    try:
        prepare(spec_of(tmp_path))
        record = train(spec_of(tmp_path))
    finally:
        os.umask(before)
    made = [record.dir.parent, record.dir, *record.dir.rglob("*")]
    assert [path for path in made if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize("eval_every", [0, -1])
def test_steps_between_looks_are_one_or_more(eval_every: int) -> None:
    class Never(Toy):
        eval_every: int = 0

    for make in (Toy, Never):
        with pytest.raises(RecipeError, match=rf"{make.__name__}: eval_every .*found {eval_every}"):
            make(eval_every=eval_every)
    with pytest.raises(RecipeError, match="found 0"):
        Never()


class Overtaken(Toy):
    """At step 25 another driver takes over, goes on from step 20, and commits step 30."""

    storage: ClassVar[Path]
    told: ClassVar[list[Any]]

    def train(self, session: shoal.Session) -> None:
        record = RunRecord(Storage(self.storage), "run")
        for batch in session.batches():
            if session.steps_done == 25:
                wait_until(lambda: [e["step"] for e in record.checkpoints()] == [20], "step 20 is committed")
                token = record.fence.take()
                there = map(position_of, checkpoint_folders(record.checkpoints_dir))
                token.begin(record.fence.succession().up_to((20, 1), there))
                self.told.extend(record.events())
            session.backward(session.loss(batch))
            session.step()


@pytest.mark.parametrize("looks_every_s", [0.0, 1e6])
def test_a_run_that_was_taken_over_ends_and_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks_every_s: float
) -> None:
    """It finds out at its next look, or when it commits."""
    monkeypatch.setattr(cadence, "STOP_POLL_S", looks_every_s)
    monkeypatch.setattr(Overtaken, "storage", tmp_path, raising=False)
    monkeypatch.setattr(Overtaken, "told", told := [], raising=False)
    record = RunRecord(Storage(tmp_path), "run")
    with pytest.raises(SupersededError, match="token 2; this one has 1"):
        train(spec_of(tmp_path, Overtaken(), checkpoint_every_s=1e6))
    assert record.events() == told
    assert {position_of(path) for path in record.checkpoints_dir.iterdir()} == {(20, 1)}
    assert not record.is_locked()


def test_what_somebody_committed_who_was_taken_over_is_neither_read_nor_kept(tmp_path: Path) -> None:
    record = train(spec_of(tmp_path, target_steps=20))
    train(spec_of(tmp_path, target_steps=40))
    late = checkpoint_path(record.checkpoints_dir, 50, 1)
    shutil.copytree(folder_of(record, 20), late)
    assert checkpoint_at(record, 50) is None
    record = train(spec_of(tmp_path))
    assert [event["step"] for event in record.events(("start",))] == [0, 20, 40]
    assert record.events(("rejected",)) == [], "it is whole, and not looked at"
    assert not late.exists()


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    record = train(spec_of(tmp_path, Declining(eval_every=5), keep=1, checkpoint_every_s=0.001))
    steps = sorted(step_of(path) for path in record.checkpoints_dir.glob("step-*"))
    assert steps == [5, 60]
    best = record.best_checkpoint(maximize("accuracy"))
    assert best is not None
    assert best["step"] == 5


class Rising(Toy):
    """Worse and better: its values at steps 5, 10, ... 60."""

    VALUES: ClassVar = [3, 9, 5, 8, 1, 9, 2, 4, 0, 1, 2, 3]

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"accuracy": float(self.VALUES[self.seen[0] // 5 - 1])}

    seen: ClassVar[list[int]] = [0]

    def train(self, session: shoal.Session) -> None:
        for batch in session.batches():
            session.backward(session.loss(batch))
            self.seen[0] = session.steps_done + 1
            session.step()


@pytest.mark.parametrize("stops_at", [None, 20, 35])
def test_as_many_of_the_best_are_kept_as_is_asked_for(tmp_path: Path, stops_at: int | None) -> None:
    """Also by an attempt that knows them from the record alone. The earlier one of equals is better."""
    spec = spec_of(tmp_path, Rising(eval_every=5), keep=1, keep_best=3, checkpoint_every_s=1e6)
    if stops_at is not None:
        train(replace(spec, target_steps=stops_at))
    record = train(spec)
    assert sorted(map(step_of, record.checkpoints_dir.iterdir())) == [10, 20, 30, 60]
    best = record.best_checkpoint(maximize("accuracy"))
    assert best is not None
    assert best["step"] == 10
    written = {event["step"] for event in record.events(("checkpoint",))}
    assert written - {stops_at} == {5, 10, 15, 20, 30, 60} - {stops_at}, "no other was among the best"


def test_what_somebody_reads_is_deleted_later(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, Toy(eval_every=5), keep=1, checkpoint_every_s=0.001)
    record = train(replace(spec, target_steps=5))
    first = folder_of(record, 5)
    with reading(first):
        train(spec)
        verify(first)
    train(replace(spec, target_steps=61))
    assert not first.exists() or step_of(Run(record).best_checkpoint()) == 5


def test_what_a_dead_attempt_left_is_deleted_when_the_next_begins(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, Toy(eval_every=20), keep=1)
    record = train(spec)
    newest, *others = sorted(record.checkpoints_dir.glob("step-*"), reverse=True)
    for step in (10, 20, 30):
        if not (place := checkpoint_path(record.checkpoints_dir, step, 1)).exists():
            shutil.copytree(newest, place)  # it died when it had committed, and before it deleted
    dead = replace(Owner.here(), started=1)
    (record.dir / f".data.json.{dead}-01234567.tmp").write_text("half")
    (record.dir / "fence" / f".000002.json.{dead}-01234567.tmp").write_text("half")
    half = record.checkpoints_dir / f".step-0000000070-t000001.{dead}-01234567.tmp"
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    train(spec)
    assert set(record.checkpoints_dir.iterdir()) == {newest, *others}
    assert list(record.dir.rglob(".*")) == []
    assert [path.name for path in (record.dir / "fence").iterdir()] == ["000002.json"]


def test_asked_to_stop_it_commits_and_the_same_command_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = train(spec_of(tmp_path, name="whole"))

    class Stopping(Toy):
        """Asks its own run to stop in the middle."""

        def train(self, session: shoal.Session) -> None:
            for batch in session.batches():
                if session.steps_done == 33:
                    session._boundary._stop = True  # type: ignore[attr-defined]
                session.backward(session.loss(batch))
                session.step()

    stopped = train(spec_of(tmp_path, Stopping()))
    assert stopped.state() == RunState.STOPPED
    assert stopped.step == 34
    resumed = train(spec_of(tmp_path))
    assert resumed.events(("start",))[-1]["step"] == 34
    for name, tensor in weights_of(whole, 60).items():
        assert torch.equal(tensor, weights_of(resumed, 60)[name])


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    train(spec_of(tmp_path, target_steps=40))
    record = train(spec_of(tmp_path, target_steps=60))
    assert [start["step"] for start in record.events(("start",))] == [0, 40]
    whole = train(spec_of(tmp_path, name="whole"))
    assert torch.equal(weights_of(record, 60)["0.weight"], weights_of(whole, 60)["0.weight"])


class Resized(Toy):
    """Orders its own run to go on with another number of workers, as a driver would, in step 10."""

    def train(self, session: shoal.Session) -> None:
        record = RunRecord(self.storage, "run")  # type: ignore[attr-defined]
        for batch in session.batches():
            if session.steps_done == 10:
                record.resizing.order(record.attempt, 3)
            session.backward(session.loss(batch))
            session.step()


@pytest.fixture
def resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> shoal.Recipe:
    monkeypatch.setattr(cadence, "STOP_POLL_S", 0.0)
    monkeypatch.setattr(Resized, "storage", Storage(tmp_path), raising=False)
    return Resized(eval_every=60)


def test_ordered_to_resize_it_commits_that_very_boundary_and_has_not_ended(
    tmp_path: Path, resized: shoal.Recipe
) -> None:
    record = train(spec_of(tmp_path, resized, checkpoint_every_s=1e6))
    (line,) = record.events(("resize",))
    assert (line["step"], line["from"], line["to"]) == (11, 1, 3)
    assert record.events(("end",)) == []
    assert (record.state(), record.step) == (RunState.INTERRUPTED, 11)
    verify(folder_of(record, 11))
    assert RunRecord(Storage(tmp_path), "run").resizing.ordered(1) == 3, "nobody took it back"
    again = train(spec_of(tmp_path, Toy(eval_every=60)))
    assert again.state() == RunState.FINISHED, "an order is for one attempt"
    assert again.events(("start",))[-1]["step"] == 11


def test_asked_to_stop_and_to_resize_it_stops(tmp_path: Path, resized: shoal.Recipe) -> None:
    spec = spec_of(tmp_path, resized)
    prepare(spec)
    RunRecord(spec.storage, spec.name).resizing.order(1, 3)
    RunRecord(spec.storage, spec.name).mark_stop()
    record = train(spec)
    assert [event["state"] for event in record.events(("resize", "end"))] == ["stopped"]


@pytest.mark.parametrize(("checkpoint_every_s", "leaves_at"), [(0.0, [12]), (1e6, [])])
def test_what_cannot_be_committed_is_not_left_and_tried_again_with_the_next_checkpoint(
    tmp_path: Path,
    resized: shoal.Recipe,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_every_s: float,
    leaves_at: list[int],
) -> None:
    write = checkpoints.write_snapshot

    def write_or_fail(directory: Path, snap: checkpoints.Snapshot) -> int:
        if snap.step == 11:
            raise StorageError(f"cannot commit {directory}: No space left on device")
        return write(directory, snap)

    monkeypatch.setattr(checkpoint_writer, "write_snapshot", write_or_fail)
    record = train(spec_of(tmp_path, resized, checkpoint_every_s=checkpoint_every_s))
    assert [event["step"] for event in record.events(("resize",))] == leaves_at
    assert "No space left" in record.events(("warning",))[0]["message"]
    assert record.state() == (RunState.INTERRUPTED if leaves_at else RunState.FINISHED)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_serves(tmp_path: Path, damage: str) -> None:
    record = train(spec_of(tmp_path, Toy(eval_every=60), checkpoint_every_s=0.001, keep=5))
    folders = sorted(record.checkpoints_dir.glob("step-*"))
    file = folders[-1] / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-1])
    again = train(spec_of(tmp_path, Toy(eval_every=60)))
    rejected = again.events(("rejected",))
    assert [event["path"].split("/")[-1] for event in rejected] == [folders[-1].name]
    assert again.events(("start",))[-1]["step"] == step_of(folders[-2])
    assert again.state() == RunState.FINISHED


def broken(method: str, body: Callable[..., Any]) -> shoal.Recipe:
    return type("Broken", (Toy,), {method: body})()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (broken("loss", lambda self, m, b: m(b[0])), r"must be a scalar tensor.*\(12, 2\)"),
        (broken("loss", lambda self, m, b: 3.0), "must be a scalar tensor.*float"),
        (broken("loss", lambda self, m, b: torch.tensor(3.0)), "does not depend on the model"),
        (broken("loss", lambda self, m, b: m(b[0]).sum() * float("nan")), "step 0: the loss is nan"),
        (
            broken("metrics", lambda self, m, b: {"f1": 1.0}),
            "objective is the highest accuracy, but metrics.. gave f1",
        ),
        (broken("build_data", lambda self: [1]), "must return shoal.Datasets"),
        (
            broken("build_data", lambda self: shoal.Datasets(train=[], val=[1])),  # type: ignore[arg-type]
            "the train dataset is empty",
        ),
        (
            broken("build_data", lambda self: shoal.Datasets(train=iter([1]), val=[1])),  # type: ignore[arg-type]
            "train dataset has no len",
        ),
        (broken("build_model", lambda self: 1 / 0), "ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_a_recipe_ends_the_run_with_its_error(
    tmp_path: Path, recipe: shoal.Recipe, message: str
) -> None:
    import re

    assert re.search(message, error_of(train(spec_of(tmp_path, recipe))))


def test_the_recipes_own_traceback_is_kept(tmp_path: Path) -> None:
    record = train(spec_of(tmp_path, broken("loss", lambda self, m, b: m.no_such_thing)))
    assert "no_such_thing" in record.events(("end",))[-1]["traceback"]


def test_weights_that_became_nan_are_never_committed(tmp_path: Path) -> None:
    class Poisoned(Toy):
        """Its weights turn NaN in its last step, after the loss was measured."""

        def train(self, session: shoal.Session) -> None:
            for batch in session.batches():
                session.backward(session.loss(batch))
                if session.steps_done == 39:
                    session.model[0].weight.grad.fill_(float("nan"))
                session.step()

    record = train(spec_of(tmp_path, Poisoned(), target_steps=40))
    assert "NaN or infinite, so nothing was saved" in error_of(record)
    assert not list(record.checkpoints_dir.glob("step-*40"))


def test_other_data_under_the_same_name_is_refused(tmp_path: Path) -> None:
    train(spec_of(tmp_path))

    class OtherData(Toy):
        """One sample less."""

        def build_data(self) -> shoal.Datasets:
            data = super().build_data()
            return shoal.Datasets(train=torch.utils.data.Subset(data.train, range(69)), val=data.val)

    assert "was trained on other data" in error_of(train(spec_of(tmp_path, OtherData(), target_steps=61)))


def test_a_changed_model_says_so_instead_of_loading_half(tmp_path: Path) -> None:
    train(spec_of(tmp_path, target_steps=40))
    other = broken("build_model", lambda self: nn.Sequential(nn.Linear(8, 2)))
    assert "does not fit the recipe as it is now" in error_of(train(spec_of(tmp_path, other)))


def test_a_full_disk_keeps_training_and_fails_only_where_the_last_checkpoint_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.write_snapshot

    def write_or_fail(directory: Path, snap: checkpoints.Snapshot) -> int:
        if snap.step < 60:
            error = OSError(errno.ENOSPC, "No space left on device")
            raise StorageError(f"cannot commit {directory}: {error}.") from error
        return write(directory, snap)

    monkeypatch.setattr(checkpoint_writer, "write_snapshot", write_or_fail)
    record = train(spec_of(tmp_path))
    assert record.state() == RunState.FINISHED
    began, over = record.events(("disk_full",))
    assert "No space left" in began["message"]
    assert "no checkpoint at step 20" in began["message"]
    assert [event["is_over"] for event in (began, over)] == [False, True], "said once, and when it is over"


def trained_package(tmp_path: Path, *, version: int) -> tuple[RunRecord, Path]:
    """A run and its model, in the folder of version 1 whatever its version."""
    spec = spec_of(tmp_path, name="first")
    prepare(spec)
    package = tmp_path / "models" / "toy" / "1"
    write_run_package(Run(train(spec)), package, model="toy", version=version)
    return RunRecord(spec.storage, spec.name), package


def test_init_from_starts_from_another_models_weights(tmp_path: Path) -> None:
    first, package = trained_package(tmp_path, version=1)
    record = train(spec_of(tmp_path, init_from=package, init_from_name="toy@1", target_steps=1))
    start = record.events(("start",))[0]
    assert (start["source"], start["step"]) == ("init_from", 0)
    change = weights_of(record, 1)["0.weight"] - weights_of(first, 60)["0.weight"]
    assert 0 < change.abs().max() < 0.2, "one step away from the weights it started from"


def test_init_from_another_version_than_asked_for_is_refused(tmp_path: Path) -> None:
    _, package = trained_package(tmp_path, version=2)
    with pytest.raises(CorruptError, match="holds toy@2, not toy@1"):
        train(spec_of(tmp_path, init_from=package, init_from_name="toy@1"))


def test_two_attempts_never_train_one_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.errors import RequestError
    from shoal.storage import FileLock
    from shoal.train import engine

    monkeypatch.setattr(engine, "LOCK_TIMEOUT_S", 0.1)
    spec = spec_of(tmp_path)
    lock = FileLock(RunRecord(spec.storage, spec.name).lock_path)
    lock.path.parent.mkdir(parents=True)
    lock.acquire()
    with pytest.raises(RequestError, match="being trained already"):
        train(spec)
    lock.release()
    assert train(spec).state() == RunState.FINISHED


def test_a_damaged_newest_checkpoint_never_pushes_out_what_verifies(tmp_path: Path) -> None:
    record = train(spec_of(tmp_path, Toy(eval_every=60), target_steps=40, keep=1))
    folder_of(record, 40).rename(checkpoint_path(record.checkpoints_dir, 900, 1))
    record = train(spec_of(tmp_path, Toy(eval_every=60), target_steps=60, keep=1))
    kept = {step_of(path) for path in record.checkpoints_dir.glob("step-*")}
    assert 60 in kept


def test_a_best_checkpoint_that_was_damaged_is_no_longer_the_best(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, Declining(), target_steps=20)
    RunRecord(spec.storage, spec.name).claim_identity(spec.identity())
    record = train(spec)
    weights = folder_of(record, 20) / checkpoints.MODEL_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    record = train(spec_of(tmp_path, Declining()))
    assert [event["path"] for event in record.events(("rejected",))] == [
        "checkpoints/step-0000000020-t000001"
    ]
    verify(Run(record).best_checkpoint())


def test_a_copy_that_somebody_made_of_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    record = train(spec_of(tmp_path, target_steps=20))
    copy = record.checkpoints_dir / "step-0000000020-t000001.bak"
    shutil.copytree(folder_of(record, 20), copy)
    record = train(spec_of(tmp_path))
    assert record.state() == RunState.FINISHED
    assert record.events(("start",))[-1]["step"] == 20
    assert record.events(("rejected",)) == [], "it is none, so it is not a damaged one either"
    assert copy.is_dir()


def test_a_checkpoint_under_another_steps_name_is_not_used(tmp_path: Path) -> None:
    record = train(spec_of(tmp_path, target_steps=20))
    other = checkpoint_path(record.checkpoints_dir, 99, 1)
    shutil.copytree(folder_of(record, 20), other)
    record = train(spec_of(tmp_path))
    assert record.events(("start",))[-1]["step"] == 20
    (rejected,) = record.events(("rejected",))
    assert rejected["path"] == f"checkpoints/{other.name}"
    assert "step 20" in rejected["reason"]
    assert other.is_dir()


def prepared(spec: RunSpec) -> RunRecord:
    prepare(spec)
    return train(spec)


def test_another_runs_checkpoint_is_not_used(tmp_path: Path) -> None:
    record = prepared(spec_of(tmp_path, target_steps=20))
    other = prepared(spec_of(tmp_path, Toy(lr=0.1), name="other", target_steps=40))
    name = folder_of(other, 40).name
    shutil.copytree(other.checkpoints_dir / name, record.checkpoints_dir / name)
    record = prepared(spec_of(tmp_path))
    assert record.events(("start",))[-1]["step"] == 20
    (rejected,) = record.events(("rejected",))
    assert rejected["path"] == f"checkpoints/{name}"
    assert "of another run" in rejected["reason"]
    assert record.state() == RunState.FINISHED
    whole = prepared(spec_of(tmp_path, name="whole"))
    assert torch.equal(weights_of(record, 60)["0.weight"], weights_of(whole, 60)["0.weight"])


def test_another_runs_checkpoint_does_not_become_this_runs_model(tmp_path: Path) -> None:
    record = prepared(spec_of(tmp_path))
    other = prepared(spec_of(tmp_path, Toy(lr=0.1), name="other"))
    best = Run(record).best_checkpoint()
    shutil.rmtree(best)
    shutil.copytree(folder_of(other, step_of(best)), best)
    with pytest.raises(CorruptError, match="of another run"):
        write_run_package(Run(record), tmp_path / "models" / "toy" / "1", model="toy", version=1)


def test_a_run_whose_folder_was_copied_goes_on(tmp_path: Path) -> None:
    record = prepared(spec_of(tmp_path, target_steps=20))
    shutil.copytree(record.dir, record.dir.with_name("copy"))
    copy = prepared(spec_of(tmp_path, name="copy"))
    assert [event["step"] for event in copy.events(("start",))] == [0, 20]


def test_a_state_of_another_step_is_not_used(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, Toy(eval_every=10), target_steps=20)
    record = train(spec)
    newest = folder_of(record, 20)
    meta, contents = verify(newest).meta, {file.name: file.read_bytes() for file in newest.iterdir()}
    state = json.loads(contents.pop("state.json"))
    shutil.rmtree(newest)
    contents.pop(MANIFEST)

    def write(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        (folder / "state.json").write_text(json.dumps({**state, "step": 19}))

    commit(newest, write, meta=meta)
    record = train(replace(spec, target_steps=60))
    assert record.events(("start",))[-1]["step"] == 10
    (rejected,) = record.events(("rejected",))
    assert "state.json is not of that step" in rejected["reason"]


def test_a_checkpoint_says_of_which_run_it_is(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    record = prepared(spec)
    meta = verify(folder_of(record, 60)).meta
    assert meta == {"kind": "checkpoint", "step": 60, "run": digest_of(spec.identity()), "token": 1}


def test_a_mask_of_minus_infinity_is_no_broken_weight(tmp_path: Path) -> None:
    class Masked(Toy):
        def build_model(self) -> nn.Module:
            model = super().build_model()
            model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            return model

    record = train(spec_of(tmp_path, Masked()))
    assert record.state() == RunState.FINISHED
    assert len(record.events(("checkpoint",))) >= 1


def test_a_checkpoint_whose_line_was_lost_with_its_process_is_found(tmp_path: Path) -> None:
    record = train(spec_of(tmp_path))
    lines = record.journal_path.read_text().splitlines(keepends=True)
    record.journal_path.write_text(
        "".join(line for line in lines if json.loads(line)["kind"] not in ("checkpoint", "end"))
    )
    record = train(spec_of(tmp_path))
    assert record.state() == RunState.FINISHED
    assert Run(record).best_checkpoint() == checkpoint_path(record.checkpoints_dir, 60, 1)
    (line,) = record.events(("checkpoint",))
    assert line["values"] == record.last_eval("val")


def test_peers_hear_from_the_first_while_its_disk_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait in a collective, and no collective may take as long as a disk may."""
    told, written = [], threading.Event()

    class Telling(Group):
        def share(self, value: Any) -> Any:
            if value is False:
                told.append(value)
                if len(told) >= 3:
                    written.set()
            return value

    def slowly(directory: Path, snap: checkpoints.Snapshot) -> int:
        written.wait(DEADLINE_S)
        return write(directory, snap)

    write = checkpoints.write_snapshot
    monkeypatch.setattr(checkpoint_writer, "write_snapshot", slowly)
    monkeypatch.setattr(boundary, "WRITE_SLICE_S", 0.01)
    spec = spec_of(tmp_path, Toy(eval_every=60))
    train_worker(spec, Telling(0, 1, torch.device("cpu")))
    assert len(told) >= 3
    assert RunRecord(spec.storage, spec.name).state() == RunState.FINISHED


def test_backward_twice_for_one_batch_is_refused(tmp_path: Path) -> None:
    class Twice(Toy):
        """Accumulates gradients by hand."""

        def train(self, session: shoal.Session) -> None:
            for batch in session.batches():
                session.backward(session.loss(batch))
                session.backward(session.loss(batch))

    assert "backward after backward" in error_of(train(spec_of(tmp_path, Twice())))


def test_step_without_backward_is_refused(tmp_path: Path) -> None:
    class Skipping(Toy):
        """Forgets the backward pass."""

        def train(self, session: shoal.Session) -> None:
            for _ in session.batches():
                session.step()

    assert "step after batch" in error_of(train(spec_of(tmp_path, Skipping())))


def test_clipping_bounds_the_summed_gradient_and_records_its_norm(tmp_path: Path) -> None:
    class Clipped(Toy):
        """Clips hard."""

        def train(self, session: shoal.Session) -> None:
            for batch in session.batches():
                session.backward(session.loss(batch))
                session.step(max_grad_norm=1e-3)
                norm = torch.cat([p.grad.flatten() for p in session.model.parameters()]).norm()
                assert norm <= 1.01e-3

    record = train(spec_of(tmp_path, Clipped()))
    assert record.state() == RunState.FINISHED
    assert record.metrics_frame()["grad_norm"].max() > 1e-3


def test_a_random_split_is_the_same_on_every_call(tmp_path: Path) -> None:
    class Splitting(Toy):
        """Splits without a generator of its own."""

        def build_data(self) -> shoal.Datasets:
            data = super().build_data()
            first, second = torch.utils.data.random_split(data.train, [50, 20])
            return shoal.Datasets(train=first, val=second)

    train(spec_of(tmp_path, Splitting(), target_steps=10))
    torch.manual_seed(99)
    assert train(spec_of(tmp_path, Splitting(), target_steps=20)).state() == RunState.FINISHED


def test_a_random_metric_does_not_change_the_training(tmp_path: Path) -> None:
    noisy = broken("metrics", lambda self, m, b: {"accuracy": torch.rand(())})
    one = train(spec_of(tmp_path, noisy, name="noisy"))
    other = train(spec_of(tmp_path, name="plain"))
    assert torch.equal(weights_of(one, 60)["0.weight"], weights_of(other, 60)["0.weight"])


def test_parameters_that_a_batch_does_not_use_get_a_zero_gradient() -> None:
    from shoal.train.reduce import GradientBuckets
    from shoal.train.scheme import fast

    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    scheme = fast(Group.alone())
    buckets = GradientBuckets(
        model.parameters(), scheme.additions, scheme.exchange, device=torch.device("cpu"), riders={}
    )
    buckets.begin(0)
    model[0](torch.ones(1, 2)).sum().backward()
    buckets.end()
    assert model[1].weight.grad is not None
    assert model[1].weight.grad.abs().sum() == 0
    assert model[0].weight.grad.abs().sum() > 0


def test_captured_output_leaves_logging_alone(tmp_path: Path) -> None:
    import logging
    import sys

    from shoal.train.output import captured_output

    with captured_output(tmp_path / "rank-0.log"):
        handler = logging.StreamHandler(sys.stderr)
        print("hello")
    logger = logging.getLogger("kept")
    logger.addHandler(handler)
    logger.error("after")
    handler.flush()
    assert not handler.stream.closed
    assert "hello" in (tmp_path / "rank-0.log").read_text()


def test_exact_refuses_a_compiled_model(tmp_path: Path) -> None:
    class Compiled(Toy):
        def build_model(self) -> nn.Module:
            return nn.Sequential(torch.compile(super().build_model(), backend="eager"))  # type: ignore[arg-type]

    record = train(spec_of(tmp_path, Compiled(), shards=4))
    assert "exact: the model is compiled" in error_of(record)


def test_an_exact_run_and_a_fast_one_are_two_runs(tmp_path: Path) -> None:
    fast, exact, finer = (spec_of(tmp_path, shards=shards).identity() for shards in (None, 4, 8))
    assert fast["exact"] is False
    assert "shards" not in fast
    assert (exact["exact"], exact["shards"]) == (True, 4)
    assert exact != finer


def test_a_buffer_that_nobody_changes_keeps_its_bits_in_an_exact_run(tmp_path: Path) -> None:
    third = torch.full((7,), 1 / 3)

    class Fixed(Toy):
        def build_model(self) -> nn.Module:
            model = super().build_model()
            model.register_buffer("third", third.clone())
            model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
            return model

    record = train(spec_of(tmp_path, Fixed(), shards=5))
    assert record.state() == RunState.FINISHED
    weights = weights_of(record, 60)
    assert torch.equal(weights["third"], third)
    assert weights["mask"].tolist() == [0.0, float("-inf")]
    assert weights["1.num_batches_tracked"] == 60, "each shard sees one batch per step"


def test_in_an_exact_run_a_worker_takes_a_step_after_its_last_shard(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Watched(Toy):
        def train(self, session: shoal.Session) -> None:
            for batch in session.batches():
                seen.append((session.steps_done, len(batch[0])))
                session.backward(session.loss(batch))
                session.step()

    train(spec_of(tmp_path, Watched(batch_size=11), shards=3, target_steps=2))
    assert seen == [(0, 3), (0, 4), (0, 4), (1, 3), (1, 4), (1, 4)]
