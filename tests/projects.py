"""Projects for tests: a folder with a ``cluster.yaml`` and this repository's jobs and apps."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_project(folder: Path, *, name: str = "test", cpu: int = 4, extra: str = "") -> Path:
    """Make ``folder`` a project on this machine; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text(
        f"version: 1\nname: {name}\nserve: {{port: 0}}\ntargets: {{local: {{cpu: {cpu}}}}}\n{extra}"
    )
    for part in ("jobs", "serve_apps"):
        if not (folder / part).exists():
            (folder / part).symlink_to(ROOT / part)
    return folder
