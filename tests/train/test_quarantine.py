"""A sample whose loading raises: others take its place, on every rank and after every restart the same."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import shoal
from fleet import KILLED, Fleet, Group
from shoal.errors import CorruptError
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from shoal.train import group as room
from shoal.train.engine import train_worker
from shoal.train.quarantine import read_quarantine
from shoal.train.spec import RunSpec
from toy import Toy
from toy_elastic import samples_by_step
from trainees import fingerprint_of

STEPS = 12
EXACT: dict[str, Any] = {"batch_size": 14, "shards": 5, "steps": STEPS}
BAD = [11, 40]


class Flaky(Dataset[Any]):
    """Samples with noise; loading those of ``fails`` raises, as often as it says."""

    def __init__(self, data: Dataset[Any], fails: dict[int, int]) -> None:
        self.data, self.left = data, Counter(fails)
        self.loaded: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        noise = torch.randn(8)
        if self.left[index] > 0:
            self.left[index] -= 1
            raise ValueError(f"bad picture {index}")
        self.loaded[index] += 1
        return x + noise, y


def flaky(fails: dict[int, int], *, loader_workers: int = 0, tries: int = 3) -> shoal.Recipe:
    class FlakyToy(Toy):
        def build_data(self) -> shoal.Datasets:
            data = super().build_data()
            train = Flaky(data.train, fails)
            FlakyToy.made = train  # type: ignore[attr-defined]
            return replace(data, train=train, loader_workers=loader_workers, tries=tries)

    return FlakyToy()


def train(storage: Path, recipe: shoal.Recipe, **changes: Any) -> RunRecord:
    spec = RunSpec(recipe=recipe, name="run", storage=Storage(storage), target_steps=STEPS, **changes)
    train_worker(spec, room.Group.alone())
    return RunRecord(spec.storage, spec.name)


FOREVER = 10**6


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_run_that_knows_of_the_quarantine_gives_the_bits_of_the_one_that_found_it(
    tmp_path: Path, loader_workers: int
) -> None:
    recipe = flaky({11: FOREVER, 40: FOREVER}, loader_workers=loader_workers)
    found = train(tmp_path / "found", recipe, shards=3)
    assert found.state() is RunState.FINISHED
    events = found.events(("quarantined",))
    assert sorted(event["sample"] for event in events) == BAD
    assert "bad picture" in events[0]["error"]
    assert read_quarantine(found.dir) == {event["sample"]: event["step"] for event in events}
    known = Storage(tmp_path / "known").run_dir("run")
    known.mkdir(parents=True)
    shutil.copytree(found.dir / "quarantined", known / "quarantined")
    again = train(tmp_path / "known", flaky({}, loader_workers=loader_workers), shards=3)
    assert again.events(("quarantined",)) == []
    assert fingerprint_of(tmp_path / "known", "run", STEPS) == fingerprint_of(
        tmp_path / "found", "run", STEPS
    )


def test_a_sample_that_fails_less_often_is_used_as_if_nothing_had_been(tmp_path: Path) -> None:
    record = train(tmp_path / "flaky", flaky({11: 3}))  # once as the loader takes it, twice when it is tried
    assert record.events(("quarantined",)) == []
    train(tmp_path / "whole", flaky({}))
    assert fingerprint_of(tmp_path / "flaky", "run", STEPS) == fingerprint_of(
        tmp_path / "whole", "run", STEPS
    )


def test_the_number_of_tries_is_the_data_sets(tmp_path: Path) -> None:
    record = train(tmp_path, flaky({11: 3}, tries=1))
    assert [(event["sample"], event["tries"]) for event in record.events(("quarantined",))] == [(11, 1)]


def test_a_data_set_that_is_broken_ends_the_run(tmp_path: Path) -> None:
    record = train(tmp_path, flaky(dict.fromkeys(range(1, 70), FOREVER)))
    assert record.state() is RunState.FAILED
    (end,) = record.events(("end",))
    assert end["error_type"] == "RecipeError"
    assert "of 70 samples at most 3 are replaced" in end["error"]
    assert 'raise ValueError(f"bad picture' in end["traceback"]
    assert len(record.events(("quarantined",))) == 3


def test_a_batch_that_does_not_fit_together_is_the_recipes_error(tmp_path: Path) -> None:
    class Ragged(Toy):
        def build_data(self) -> shoal.Datasets:
            def collate(samples: list[Any]) -> Any:
                raise RuntimeError("stack expects each tensor to be equal size")

            return replace(super().build_data(), collate=collate)

    record = train(tmp_path, Ragged())
    assert "stack expects each tensor" in record.events(("end",))[0]["error"]
    assert record.events(("quarantined",)) == []


def test_a_damaged_note_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quarantined").mkdir()
    (tmp_path / "quarantined" / "3.json").write_text(json.dumps({"sample": 4, "step": 1}))
    with pytest.raises(CorruptError, match="names no sample"):
        read_quarantine(tmp_path)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


def test_any_number_of_workers_puts_the_same_samples_in_their_places(fleet: Fleet, tmp_path: Path) -> None:
    group = Group(storage=str(tmp_path), name="alone", workers=1, unreadable=BAD, **EXACT)
    alone = fleet.train_elastic(group)
    assert sorted(event["sample"] for event in alone.events(("quarantined",))) == BAD
    seen = samples_by_step(alone)
    assert all(len(samples) == 14 and not set(samples) & set(BAD) for samples in seen.values())
    killed = replace(group, name="killed", workers=3)
    assert fleet.train(replace(killed, die_at_step=9)) == [KILLED] * 3
    record = fleet.train_elastic(replace(killed, workers=2))
    assert record.state() is RunState.FINISHED
    assert samples_by_step(record) == seen
    assert fingerprint_of(tmp_path, "killed", STEPS) == fingerprint_of(tmp_path, "alone", STEPS)
