"""The judge: what is wrong with a run that was disturbed, from what is on disk and from what an undisturbed one left.

Knows nothing of how workers die or are replaced. Every function returns problems as sentences; none is a pass.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from shoal.errors import CorruptError
from shoal.storage import NO_TOKEN, Storage, verify
from shoal.tracking import RunRecord, RunState
from shoal.train.stamp import checkpoint_at, checkpoint_path, names_checkpoint

RUN = "run"
_MAY_STAY = frozenset(
    {"identity.json", "journal.jsonl", "checkpoints", "lock", "driver.lock", "data.json", "fence"}
)
_TOKEN = re.compile(r"\d{6}\.json")
_KEPT = 3
"""Two newest and the best."""


@dataclass(frozen=True)
class Shape:
    """What the run was to do."""

    steps: int
    batch_size: int
    num_samples: int

    @property
    def steps_per_epoch(self) -> int:
        """A whole number: batches do not span epochs here."""
        return self.num_samples // self.batch_size


@dataclass(frozen=True)
class Left:
    """What a scenario left in its folder."""

    folder: Path

    @property
    def record(self) -> RunRecord:
        return RunRecord(Storage(self.folder / "storage"), RUN)

    def final(self, steps: int) -> Path:
        """The folder of the last checkpoint; where none counts, one that is not there."""
        found = checkpoint_at(self.record, steps)
        return found or checkpoint_path(self.record.checkpoints_dir, steps, NO_TOKEN)

    def played(self) -> dict[str, Any]:
        """How the arena says that it went."""
        found: dict[str, Any] = json.loads((self.folder / "played.json").read_text())
        return found

    def seen(self) -> list[dict[str, Any]]:
        """What the workers told, in order."""
        return [json.loads(line) for line in (self.folder / "seen.jsonl").read_text().splitlines()]


def problems(left: Left, undisturbed: Left, shape: Shape) -> list[str]:
    """Everything that is not as it must be; empty when the proof holds."""
    if told := left.played()["problem"]:
        return [told]
    return [
        *check_end(left.record, shape),
        *check_bits(left.final(shape.steps), undisturbed.final(shape.steps)),
        *check_samples(left.seen(), shape),
        *check_measured(left.record, undisturbed.record),
        *check_left_behind(left.record.dir),
    ]


def check_end(record: RunRecord, shape: Shape) -> list[str]:
    """The record says that the run finished, at its last step."""
    end = record.events(("end",))[-1:]
    if record.state() == RunState.FINISHED and end[0]["step"] == shape.steps:
        return []
    return [f"the run is {record.state()} at step {record.step}, not finished at step {shape.steps}: {end}"]


def check_bits(final: Path, expected: Path) -> list[str]:
    """The last checkpoint verifies, and its tensors are the undisturbed run's."""
    try:
        verify(final)
    except CorruptError as error:
        return [str(error)]
    found, wanted = tensors_digest(final), tensors_digest(expected)
    return [] if found == wanted else [f"other bits: {final} has {found[:12]}, undisturbed {wanted[:12]}"]


def tensors_digest(checkpoint: Path) -> str:
    """SHA-256 over the parameters, buffers and optimizer state of a checkpoint."""
    files = sorted(checkpoint.glob("*.safetensors"))
    assert files, f"{checkpoint} holds no tensors"
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def check_samples(seen: list[dict[str, Any]], shape: Shape) -> list[str]:
    """Every sample of every epoch was trained on exactly once, counting the attempt that completed each step."""
    completed = completed_by(seen, shape)
    if isinstance(completed, str):
        return [completed]
    found = []
    ids_of: dict[tuple[int, int], list[int]] = defaultdict(list)  # (attempt, step)
    for said in seen:
        if "ids" in said:
            ids_of[said["attempt"], said["step"]] += said["ids"]
    used = [sorted(ids_of[completed[step], step]) for step in range(shape.steps)]
    for first in range(0, shape.steps, shape.steps_per_epoch):
        epoch = range(first, min(first + shape.steps_per_epoch, shape.steps))
        counts = Counter(sample for step in epoch for sample in used[step])
        missing = [sample for sample in range(shape.num_samples) if not counts[sample]]
        twice = [sample for sample, count in counts.items() if count > 1]
        if missing or twice:
            found.append(
                f"steps {epoch.start} to {epoch.stop - 1}: missing {missing}, more than once {twice}"
            )
    for (attempt, step), ids in ids_of.items():
        if step >= shape.steps or Counter(ids) - Counter(used[step]):
            found.append(f"step {step} had other samples in attempt {attempt}")
    return found


def completed_by(seen: Iterable[dict[str, Any]], shape: Shape) -> list[int] | str:
    """Which attempt completed each step: the last that began before it. A sentence where they do not fit."""
    begins: dict[int, set[int]] = defaultdict(set)
    for said in seen:
        if "begin" in said:
            begins[said["attempt"]].add(said["begin"])
    if apart := [attempt for attempt, steps in begins.items() if len(steps) > 1]:
        return f"in attempt {apart[0]} workers began at different steps: {sorted(begins[apart[0]])}"
    order = sorted((attempt, steps.pop()) for attempt, steps in begins.items())
    if not order or order[0][1] != 0:
        return f"the first attempt did not begin at step 0: {order}"
    completed: list[int] = []
    for attempt, step in order:
        completed = completed[:step] + [attempt] * (shape.steps - step)
    return completed


def num_lost(seen: Iterable[dict[str, Any]]) -> int:
    """How many steps were computed again: an attempt began before the last step that the one before it was in."""
    lost = last = 0
    began: set[int] = set()
    for said in seen:
        if "begin" in said and said["attempt"] not in began:
            began.add(said["attempt"])
            lost += max(0, last - said["begin"])
            last = said["begin"]
        elif "step" in said:
            last = max(last, said["step"])
    return lost


def check_measured(record: RunRecord, undisturbed: RunRecord) -> list[str]:
    """Every evaluation was recorded with the same values, and no training loss is another."""
    found = []
    for kind in ("eval", "metrics"):
        here, there = measured(record, kind), measured(undisturbed, kind)
        # A line of metrics may be lost with the process that was about to write it; an evaluation may not.
        if kind == "eval" and (missing := sorted(there.keys() - here.keys())):
            found.append(f"not evaluated: {missing}")
        found += [
            f"{kind} {key}: {here[key]}, undisturbed {there[key]}"
            for key in sorted(here.keys() & there.keys())
            if here[key] != there[key]
        ]
        if unknown := sorted(here.keys() - there.keys()):
            found.append(f"{kind} {unknown} are not the undisturbed run's")
    return found


def measured(record: RunRecord, kind: str) -> dict[tuple[int, str], Any]:
    """Values by step and split; of what was repeated, the last. Of training the loss alone: rates differ."""
    return {
        (event["step"], event.get("split", "train")): (
            event["values"] if kind == "eval" else event["values"]["loss"]
        )
        for event in record.events((kind,))
    }


def check_left_behind(run: Path) -> list[str]:
    """Nothing but what a run consists of is in its folder: no temporary file, no checkpoint too many."""
    found = [f"left behind: {path.relative_to(run)}" for path in run.iterdir() if path.name not in _MAY_STAY]
    checkpoints = run / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    found += [f"left behind: checkpoints/{name}" for name in names if not names_checkpoint(name)]
    tokens = [path.name for path in (run / "fence").glob("*")]
    found += [f"left behind: fence/{name}" for name in tokens if not _TOKEN.fullmatch(name)]
    if len(tokens := [name for name in tokens if _TOKEN.fullmatch(name)]) > 1:
        found.append(f"more tokens than the last holder's are left: {', '.join(sorted(tokens))}")
    if len(names) > _KEPT:
        found.append(f"{len(names)} checkpoints are kept: {', '.join(sorted(names))}")
    return found


def check_processes(group: int) -> list[str]:
    """No process of that process group is left, but the one that leads it and may be about to end."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.pid != group:
                found.append(f"a process is left: {process.pid} {' '.join(process.cmdline())}")
    return found
