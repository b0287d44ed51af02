"""docs/design.md names what is on disk and in the journal: compared with what a run leaves behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from projects import ROOT
from shoal.config import Range
from shoal.storage import FileLock, Storage
from shoal.tracking import RunRecord, Wish
from shoal.train.engine import train_worker
from shoal.train.group import Group
from shoal.train.spec import RunSpec
from toy import Toy

PAGE = (ROOT / "docs" / "design.md").read_text()


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """A run that was trained here, driven, resized, and asked to stop."""
    spec = RunSpec(recipe=Toy(), name="toy", storage=Storage(tmp_path_factory.mktemp("s")), target_steps=40)
    record = RunRecord(spec.storage, spec.name)
    record.claim_identity(spec.identity())
    with FileLock(record.driver_lock_path):
        train_worker(spec, Group.alone())
    record.resizing.begin(Wish(workers=Range(2, 2), most=12, per_worker={"CPU": 1.0}))
    record.resizing.order(1, 2)
    record.append("resize", step=40, **{"from": 1, "to": 2})
    record.mark_stop()
    return record


def test_every_file_of_a_run_is_in_the_tree(record: RunRecord) -> None:
    tree = re.findall(r"^  runs/<name>/(\S+)", PAGE, flags=re.M)
    documented = {Path(re.sub(r"<.*", "", name)).parts[0] for name in tree}
    assert {path.name for path in record.dir.iterdir()} <= documented


def test_every_field_of_the_journal_is_in_the_table(record: RunRecord) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, flags=re.M)
    documented = {kind: set(re.findall(r"`(\w+)`", text)) for kind, text in rows}
    for event in record.events():
        assert event.keys() - {"t", "kind", "attempt"} <= documented[event["kind"]], event["kind"]
