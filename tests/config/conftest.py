"""``read``: the text of a cluster.yaml, loaded as if on a laptop with two cores and no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_reading import LAPTOP, Read

from shoal.config import ClusterConfig, load


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(text: str, **options: Any) -> ClusterConfig:
        (tmp_path / "cluster.yaml").write_text(text)
        return load(tmp_path, **{"env": {}, "machine": LAPTOP, **options})

    return read
