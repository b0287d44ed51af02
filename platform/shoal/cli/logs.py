"""``shoal logs``: what runs and apps print, also after the cluster is gone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from shoal.cli.command import WORK, command
from shoal.cli.project import storage
from shoal.errors import NotFoundError, did_you_mean

if TYPE_CHECKING:
    from shoal.storage import Storage

POLL_S = 0.2
_CHUNK_BYTES = 1 << 16


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    examples = (
        "shoal logs digits-1a2b3c4d",
        "shoal logs digits-1a2b3c4d -f --rank 1",
        "shoal logs digits  # of an app: every replica",
    )
    command(app, panel=WORK, examples=examples)(logs)


def logs(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A run or an app.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends (an app: until Ctrl-C).")
    ] = False,
    rank: Annotated[int, typer.Option(metavar="N", help="Worker of the run.")] = 0,
) -> None:
    """Show what a run's worker or an app's replicas printed, tracebacks too.

    They are kept on storage: they can be read when the run has ended and when the cluster is gone.
    """
    from shoal.tracking import RunRecord

    place = storage()
    if RunRecord.exists(place, name):
        _show_run(place, name, rank, follow)
    else:
        _show_app(place, name, follow)


def _show_run(place: Storage, name: str, rank: int, follow: bool) -> None:
    from shoal.train.output import log_path
    from shoal.train.run import find_run
    from shoal.train.stall import stall_text

    run = find_run(place, name)
    path = log_path(run.record.logs_dir, rank)
    if not path.exists() and not (follow and run.is_active):
        there = sorted(int(p.stem.removeprefix("rank-")) for p in run.record.logs_dir.glob("rank-*.log"))
        raise NotFoundError(
            f"run {name!r} has no log of rank {rank}; there are: {', '.join(map(str, there)) or 'none yet'}"
        )
    tail = Tail(lambda: [path], sys.stdout.buffer)
    tail.copy()
    if not path.exists() or not path.stat().st_size:
        waits = "; waiting for it (Ctrl-C leaves it running)" if follow and run.is_active else ""
        print(f"run {name} has printed nothing on rank {rank} so far{waits}", file=sys.stderr, flush=True)
    while follow and run.is_active:
        time.sleep(POLL_S)
        tail.copy()
    tail.copy()
    for event in run.record.iter_events(("stall",)):
        print(stall_text(event), file=sys.stderr, flush=True)


def _show_app(place: Storage, name: str, follow: bool) -> None:
    from shoal.tracking import list_runs

    folder = place.app_logs_dir

    def files() -> Iterable[Path]:
        found = []
        for path in folder.glob("replica_*.log"):
            with suppress(FileNotFoundError):  # rotated since it was listed: it is here under its next name
                if _app_of(path) == name:
                    found.append((path.stat().st_mtime, path))
        return [path for _, path in sorted(found)]

    if not files():
        known = [*(record.name for record in list_runs(place)), *map(_app_of, folder.glob("replica_*.log"))]
        raise NotFoundError(
            f"there is no run {name!r}, and no app of that name has written a log in {folder}; "
            f"see: shoal runs, shoal apps{did_you_mean(name, known)}"
        )
    tail = Tail(files, sys.stdout.buffer)
    tail.copy()
    while follow:
        time.sleep(POLL_S)
        tail.copy()


def _app_of(log: Path) -> str:
    """The app whose replica wrote the file: ``replica_<app>_<deployment>_<id>.log``."""
    from shoal.serve.builder import DEPLOYMENT

    return log.name.removeprefix("replica_").rpartition(f"_{DEPLOYMENT}_")[0]


class Tail:
    """Copies what files have grown by since the last time; a file that was replaced begins anew."""

    def __init__(self, files: Callable[[], Iterable[Path]], out: IO[bytes]) -> None:
        self._files = files
        self._out = out
        self._seen: dict[int, int] = {}
        """Bytes copied, by inode: a log that is rotated keeps its inode under another name."""

    def copy(self) -> None:
        """Copy what is new. Does not wait for more."""
        for path in self._files():
            try:
                with path.open("rb") as file:
                    self._copy(file)
            except FileNotFoundError:  # not written yet, or just rotated: the next look finds it
                continue
        self._out.flush()

    def _copy(self, file: IO[bytes]) -> None:
        found = os.fstat(file.fileno())
        offset = self._seen.get(found.st_ino, 0)
        file.seek(offset if offset <= found.st_size else 0)
        while chunk := file.read(_CHUNK_BYTES):
            self._out.write(chunk)
        self._seen[found.st_ino] = file.tell()
