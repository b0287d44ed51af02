"""Projects for tests: a folder with a ``cluster.yaml`` and this repository's jobs and apps."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_READ_SERVE_URL = 'import json; print(json.load(open(".shoal/cluster.json"))["serve_url"])'


SERVE_URL = "http://127.0.0.1:8000"
"""Where documents ask an app; in tests the port is a free one."""
FOUND_SERVE_URL = f"$({shlex.quote(sys.executable)} -c {shlex.quote(_READ_SERVE_URL)})"
"""The same in a shell in the project's folder, as its running cluster knows it."""


def outside_environment(**extra: str) -> dict[str, str]:
    """What a new shell has, with this Python's programs on its path: nothing of a cluster this process knows."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "SHOAL_")) and name != "PYTHONPATH"
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', '')}"
    return {**inherited, "PATH": path, **extra}


def write_project(folder: Path, *, name: str = "test", cpu: int = 4, extra: str = "") -> Path:
    """Make ``folder`` a project on this machine; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text(
        f"version: 1\nname: {name}\nserve: {{port: 0, replicas: 1..3}}\ntargets: {{local: {{cpu: {cpu}}}}}\n{extra}"
    )
    for part in ("jobs", "serve_apps"):
        if not (folder / part).exists():
            (folder / part).symlink_to(ROOT / part)
    return folder
