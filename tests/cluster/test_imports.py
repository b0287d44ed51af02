"""What runs import is imported ahead by the next processes: libraries, and nothing of the project."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from shoal.cluster import imports
from shoal.cluster.processes import CLUSTER_ID

RARE = "colorsys"


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is noted, for a process of a cluster that has not imported `RARE`."""
    monkeypatch.setenv(CLUSTER_ID, "0123456789abcdef")
    monkeypatch.setattr(imports, "run_dir_of", lambda cluster_id: tmp_path)
    monkeypatch.setattr(imports, "MODULES", ())
    monkeypatch.delitem(sys.modules, RARE, raising=False)
    return tmp_path / "imports.json"


def test_a_library_that_a_run_imported_is_imported_ahead(
    noted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import colorsys

    assert colorsys.__name__ in sys.modules
    imports.remember_imports()
    assert noted.stat().st_mode & 0o777 == 0o600
    monkeypatch.delitem(sys.modules, RARE)
    imports.import_now()
    assert RARE in sys.modules


def test_code_of_the_project_is_not_noted(noted: Path) -> None:
    imports.remember_imports()
    names = json.loads(noted.read_text())
    assert "json" in names
    assert "pytest" in names
    assert [name for name in names if name.split(".")[0] in ("shoal", "projects", "__main__", __name__)] == []


def test_what_was_noted_stays_until_there_is_more(noted: Path) -> None:
    imports.remember_imports()
    before = noted.stat().st_ino
    imports.remember_imports()
    assert noted.stat().st_ino == before


def test_what_another_run_imported_stays(noted: Path) -> None:
    noted.write_text('["another_library"]')
    imports.remember_imports()
    assert {"another_library", "json"} <= set(json.loads(noted.read_text()))


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '["no.such.module", 7, "colorsys"]'])
def test_what_cannot_be_read_or_imported_is_passed_over(noted: Path, content: str) -> None:
    noted.write_text(content)
    imports.import_now()
    assert (RARE in sys.modules) == ("colorsys" in content)


def test_outside_a_cluster_nothing_is_noted_or_imported(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CLUSTER_ID)
    noted.write_text(f'["{RARE}"]')
    imports.import_now()
    assert RARE not in sys.modules
    noted.unlink()
    imports.remember_imports()
    assert not noted.exists()


def test_a_module_without_a_place_is_none_of_a_library() -> None:
    assert not imports._is_of_a_library("made", ModuleType("made"))
