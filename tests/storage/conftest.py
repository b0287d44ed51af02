from __future__ import annotations

from pathlib import Path

import pytest
from storage_faults import commit_content


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A small committed directory with files in two levels, one of them empty."""
    directory = tmp_path / "parent" / "step-0000000007"
    commit_content(directory)
    return directory
