"""Population-based training without Ray: how fields change, what is refused, what is booked."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from searched import Line
from torch import nn

import shoal
from committed import folder_of
from shoal.errors import NotFoundError
from shoal.storage import Storage, verify
from shoal.tracking import RunRecord
from shoal.train.adopt import adopt_checkpoint, discard_leftovers
from shoal.train.spec import RunSpec
from shoal.tune.population import check_population, default_interval, perturb, too_few_comparisons
from shoal.tune.record import SweepRecord, Trial, TrialState
from shoal.tune.search import Search
from shoal.tune.shapes import changes_shape
from shoal.tune.show import fields_text, sweep_frame
from shoal.tune.space import Space, choice, loguniform, randint, uniform
from shoal.tune.trial import TrialPlan, TrialRun
from shoal.tune.trials import Trials

SPACE: Space = {"lr": loguniform(1e-3, 1e-1)}


# How fields change


def test_changed_fields_stay_in_the_space_and_keep_their_type() -> None:
    space: Space = {
        "lr": loguniform(1e-4, 1e-1),
        "dropout": uniform(0.0, 0.5),
        "layers": randint(1, 4),
        "kind": choice(["a", "b", "c"]),
    }
    fields: dict[str, Any] = {"lr": 1e-1, "dropout": 0.5, "layers": 1, "kind": "a"}
    seen: dict[str, set[Any]] = {name: set() for name in space}
    for number in range(300):
        found = perturb(fields, space, seed=str(number))
        assert found != fields
        assert 1e-4 <= found["lr"] <= 1e-1
        assert 0.0 <= found["dropout"] <= 0.5
        assert type(found["layers"]) is int
        assert 1 <= found["layers"] <= 4
        for name, value in found.items():
            seen[name].add(value)
        fields = found
    assert seen["layers"] == {1, 2, 3, 4}
    assert seen["kind"] == {"a", "b", "c"}
    assert min(seen["lr"]) < 3e-4


def test_fields_change_by_a_factor_or_are_drawn_anew() -> None:
    ratios = [perturb({"lr": 1e-2}, SPACE, seed=str(n))["lr"] / 1e-2 for n in range(400)]
    factors = [r for r in ratios if math.isclose(r, 0.8) or math.isclose(r, 1.2)]
    assert 0.65 < len(factors) / len(ratios) < 0.85  # three of four; 4 sigma are 0.087
    assert perturb({"lr": 1e-2}, SPACE, seed="x") == perturb({"lr": 1e-2}, SPACE, seed="x")


def test_small_whole_numbers_move_too() -> None:
    found = [perturb({"layers": 2}, {"layers": randint(1, 100)}, seed=str(n))["layers"] for n in range(200)]
    assert (
        0.6 < sum(layers in (1, 3) for layers in found) / len(found) < 0.9
    )  # 2 * 1.2 and 2 * 0.8 round to 2


def test_the_interval_is_the_evaluation_nearest_to_a_fifth() -> None:
    assert [default_interval(500, 50), default_interval(400, 50), default_interval(40, 10)] == [100, 100, 10]
    assert default_interval(60, 40) == 40


# What is refused


def problems(**changes: Any) -> str:
    asked: dict[str, Any] = {
        "trials": 4,
        "side_by_side": 4,
        "steps": 40,
        "eval_every": 10,
        "perturb_every": None,
    }
    return "\n".join(check_population(**{**asked, **changes}))


def test_what_can_be_no_population_is_refused_in_words() -> None:
    assert problems() == ""
    assert problems(perturb_every=39) == ""
    assert "at least 4" in problems(trials=3)
    assert "at most 2 trials" in problems(trials=8, side_by_side=2)
    assert "lower eval_every or raise steps" in problems(eval_every=40)
    assert "from 1 to below the 40 steps of a trial; left out it is 10" in problems(perturb_every=40)
    assert "from 1 to below" in problems(perturb_every=0)


def test_trials_that_are_hardly_compared_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert (
        problems(perturb_every=19) == ""
    )  # the evaluation at 20 is half of 40: the second would be the last
    (said,) = caplog.messages
    assert said.startswith(
        "perturb_every=19 with steps=40 and eval_every=10: a trial is compared once before"
    )
    assert said.endswith("choose perturb_every of at most 10, or steps above 40")
    caplog.clear()
    assert problems(perturb_every=10) == problems() == ""
    assert problems(perturb_every=41) != ""  # refused: nothing to warn of
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("steps", "eval_every", "interval", "words"),
    [
        (41, 10, 20, ""),
        (40, 10, 39, "never before its last step"),
        (40, 15, 15, ""),
        (40, 20, 20, "choose eval_every of at most 19, or steps above 40"),
        (2, 1, 1, "choose steps above 2"),
    ],
)
def test_what_to_choose_is_compared_twice(steps: int, eval_every: int, interval: int, words: str) -> None:
    said = too_few_comparisons(steps=steps, eval_every=eval_every, interval=interval)
    assert (words in said) if words else said == ""
    for name, value in re.findall(r"(\w+) (?:of at most|above) (\d+)", said):
        better = {"steps": steps, "eval_every": eval_every, "perturb_every": interval}
        better[name] = int(value) + (name == "steps")
        spacing = max(better["perturb_every"] if name != "eval_every" else 1, 1)
        assert (
            too_few_comparisons(steps=better["steps"], eval_every=better["eval_every"], interval=spacing)
            == ""
        )


class Shaped(Line):
    """Its ``width`` is the model's."""

    def build_model(self) -> Any:
        if self.kind == "broken":
            raise ValueError("this model cannot be built")
        return nn.Sequential(nn.Linear(1, self.width), nn.Dropout(self.lr), nn.Linear(self.width, 1))


def test_fields_that_change_the_models_shape_are_told_from_those_that_do_not() -> None:
    wrong = changes_shape(Shaped(), "width", randint(1, 4))
    assert wrong is not None
    assert "width=1 and width=4 build models of different shape (0.bias is (1,) and (4,))" in wrong
    assert "only fields that leave the model's shape alone" in wrong
    assert changes_shape(Shaped(), "width", choice([2, 3])) is not None
    assert changes_shape(Shaped(), "lr", uniform(0.0, 0.5)) is None
    assert changes_shape(Shaped(kind="broken"), "width", choice([2, 3])) is None


# What is booked


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def make_plan(storage: Storage, recipe: shoal.Recipe | None = None) -> TrialPlan:
    template = RunSpec(
        recipe=recipe or Line(),
        name="s",
        storage=storage,
        target_steps=40,
        threads=1,
        checkpoint_at_eval=True,
        keep=2,
    )
    return TrialPlan(sweep="s", template=template)


def make_trials(storage: Storage, num_trials: int = 2, **changes: Any) -> Trials:
    plan = make_plan(storage, **changes)
    return Trials(
        SweepRecord(storage, "s"), plan, Search(SPACE, Line.objective, seed=0), num_trials=num_trials
    )


def half_way(storage: Storage, trial: Trial | None) -> TrialRun:
    """A trial that was measured at step 20 and stands still; stopped, it is far from its end."""
    assert trial is not None
    spec = make_plan(storage).spec(trial.number, trial.fields, trial.source)
    run = TrialRun(replace(spec, target_steps=1_000_000))
    assert [run.next().step, run.next().step] == [10, 20]
    return run


def test_an_exploit_is_a_new_run_that_names_its_source(storage: Storage) -> None:
    trials = make_trials(storage)
    loser, winner = trials.next(), trials.next()
    runs = [half_way(storage, loser), half_way(storage, winner)]
    assert loser is not None
    assert winner is not None
    booked = trials.exploit(loser.number, winner.number)
    assert booked is not None
    assert booked.source is not None
    assert (booked.number, booked.run, booked.state) == (3, "s-t003", TrialState.WAITING)
    assert (booked.source.run, booked.source.step) == (winner.run, 20)
    checkpoint = folder_of(RunRecord(storage, winner.run), 20)
    copied = storage.run_dir("s-t003") / "checkpoints" / "step-0000000020"
    assert verify(checkpoint).digest == verify(copied).digest == booked.source.digest
    assert booked.fields != winner.fields

    replaced = trials.ended(loser.number, was_pruned=True)
    assert (replaced.state, replaced.replaced_by, replaced.step) == (TrialState.PRUNED, "s-t003", 20)
    assert trials.num_trials == 3
    assert trials.next() == booked
    identity = RunRecord(storage, booked.run).identity()
    assert identity is not None
    assert identity["source"] == {"run": winner.run, "step": 20, "digest": booked.source.digest}
    assert identity["fields"]["lr"] == booked.fields["lr"]
    assert "source" not in (RunRecord(storage, winner.run).identity() or {})
    assert trials.next() is None
    assert all(run.stop() for run in runs)

    frame = sweep_frame(trials.snapshot(), Line.objective)
    assert list(frame["source"]) == ["", "", f"{winner.run}@20"]
    assert fields_text(replaced).endswith("(replaced by t003)")
    assert fields_text(booked).endswith("(from t002 at step 20)")


def test_a_run_that_goes_on_from_anothers_checkpoint_trains_to_the_end(storage: Storage) -> None:
    trials = make_trials(storage)
    loser, winner = trials.next(), trials.next()
    runs = [half_way(storage, loser), half_way(storage, winner)]
    trials.exploit(1, 2)
    trials.ended(1, was_pruned=True)
    assert all(run.stop() for run in runs)
    third = trials.next()
    assert third is not None
    run = TrialRun(make_plan(storage).spec(third.number, third.fields, third.source))
    reports = [run.next(), run.next()]
    assert [(report.step, report.has_ended) for report in reports] == [(30, False), (40, True)]
    record = RunRecord(storage, third.run)
    assert [(start["step"], start["source"]) for start in record.events(("start",))] == [(20, "adopted")]
    assert {event["values"]["lr"] for event in record.events(("metrics",))} == {third.fields["lr"]}
    assert trials.ended(third.number).state is TrialState.FINISHED
    # The next driver repeats neither what was replaced nor what finished.
    again = make_trials(storage)
    assert [trial.state for trial in again.snapshot()] == [
        TrialState.PRUNED,
        TrialState.STOPPED,
        TrialState.FINISHED,
    ]
    assert again.snapshot()[2] == trials.snapshot()[2]
    assert (again.num_left, again.num_trials) == (1, 3)


def test_a_driver_that_died_within_an_exploit_did_not_make_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = make_trials(storage)
    runs = [half_way(storage, trials.next()), half_way(storage, trials.next())]

    def die_booking_the_successor(record: SweepRecord, trial: Trial) -> None:
        if trial.source is not None:
            raise KeyboardInterrupt
        book(record, trial)

    book = SweepRecord.book
    monkeypatch.setattr(SweepRecord, "book", die_booking_the_successor)
    with pytest.raises(KeyboardInterrupt):
        trials.exploit(1, 2)
    monkeypatch.undo()
    assert SweepRecord(storage, "s").trials()[0].replaced_by == "s-t003"
    assert all(run.stop() for run in runs)

    again = make_trials(storage)
    assert [(trial.state, trial.replaced_by) for trial in again.snapshot()] == [(TrialState.STOPPED, "")] * 2
    assert again.num_left == 2
    # What the dead one copied is in the way of nothing.
    done = again.exploit(1, 2)
    assert done is not None
    assert done.number == 3
    assert len(list((storage.run_dir("s-t003") / "checkpoints").iterdir())) == 1


def test_a_persons_copy_beside_the_checkpoints_is_left_alone(storage: Storage) -> None:
    run = RunRecord(storage, "s-t003")
    leftover, copy = (run.checkpoints_dir / name for name in ("step-0000000005", "step-0000000005.bak"))
    for folder in (leftover, copy):
        folder.mkdir(parents=True)
    discard_leftovers(run)
    assert not leftover.exists()
    assert copy.is_dir()


def test_a_first_trial_does_not_go_on_from_what_a_dead_driver_copied(storage: Storage) -> None:
    trials = make_trials(storage)
    runs = [half_way(storage, trials.next()), half_way(storage, trials.next())]
    assert all(run.stop() for run in runs)
    adopt_checkpoint(RunRecord(storage, "s-t002"), RunRecord(storage, "s-t003"))  # and died here
    more = make_trials(storage, 3)
    handed_out = [more.next() for _ in range(3)]
    third = next(trial for trial in handed_out if trial is not None and trial.run == "s-t003")
    half_way(storage, third).stop()
    start = RunRecord(storage, "s-t003").events(("start",))[0]
    assert (start["step"], start["source"]) == (0, "fresh")


def test_somebody_elses_run_is_not_touched(storage: Storage) -> None:
    trials = make_trials(storage)
    runs = [half_way(storage, trials.next()), half_way(storage, trials.next())]
    theirs = RunRecord(storage, "s-t003")
    theirs.claim_identity({"recipe": "another"})
    (theirs.checkpoints_dir / "step-0000000005").mkdir(parents=True)
    booked = trials.exploit(1, 2)
    assert booked is not None
    assert booked.number == 4
    assert (theirs.checkpoints_dir / "step-0000000005").is_dir()
    assert all(run.stop() for run in runs)


def test_without_a_checkpoint_or_when_stopping_nobody_is_replaced(storage: Storage) -> None:
    trials = make_trials(storage)
    first, second = trials.next(), trials.next()
    assert first is not None
    assert second is not None
    with pytest.raises(NotFoundError, match=r"run 's-t002' has no checkpoint that verifies"):
        trials.exploit(first.number, second.number)
    trials.stop()
    assert trials.exploit(first.number, second.number) is None
    assert [trial.replaced_by for trial in trials.snapshot()] == ["", ""]


def test_what_the_sampler_did_not_suggest_is_not_told_to_it(storage: Storage) -> None:
    trials = make_trials(storage, 3)
    runs = [half_way(storage, trials.next()), half_way(storage, trials.next())]
    booked = trials.exploit(1, 2)
    assert booked is not None
    trials.ended(1, was_pruned=True)
    assert trials.next() == booked
    third = trials.next()  # of the first population, beside the one that replaced another
    assert third is not None
    assert (third.number, third.source) == (4, None)
    assert trials.next() is None
    assert all(run.stop() for run in runs)
