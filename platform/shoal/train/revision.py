"""Which code a run was trained with."""

from __future__ import annotations

import subprocess
from pathlib import Path

_GIT_TIMEOUT_S = 5.0


def code_revision(project: Path) -> str:
    """The project's git revision, with ``+dirty`` for uncommitted changes; empty where there is no git."""
    try:
        said = subprocess.run(
            [
                "git",
                "-C",
                str(project),
                "describe",
                "--always",
                "--dirty=+dirty",
                "--abbrev=12",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""
