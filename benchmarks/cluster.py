"""A cluster for one benchmark, gone when it is over."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import shoal

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def own_cluster(text: str, secrets: Mapping[str, str] | None = None) -> Iterator[shoal.Cluster]:
    """The cluster that ``text`` (a cluster.yaml) describes, in a project folder of its own, attached.

    ``secrets`` are further files of that folder by name, readable by this user alone.
    """
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'platform'}"  # workers import the benchmarks
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        project = Path(folder)
        (project / "cluster.yaml").write_text(text)
        for name, secret in (secrets or {}).items():
            (project / name).touch(mode=0o600)
            (project / name).write_text(secret)
        cluster = shoal.connect(project)
        try:
            yield cluster
        finally:
            cluster.down()
