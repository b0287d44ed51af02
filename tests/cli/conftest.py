"""A project without a cluster, and a way to type a command in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Shoal, type_command

from projects import write_project


@pytest.fixture
def shoal() -> Shoal:
    return type_command


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which no cluster runs; the current folder."""
    for name in list(os.environ):
        if name.startswith("SHOAL_"):
            monkeypatch.delenv(name)
    folder = write_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder
