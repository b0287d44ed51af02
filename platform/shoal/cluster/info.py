"""What is known about a running cluster, and how clients find it.

The record is one file, ``<project>/.shoal/cluster.json``, written once the cluster answers. It holds paths
and numbers and no secret: the token stays in its own file. It lies in the project, which may come from anywhere,
so it is not believed where that would hurt: whose token is sent where, and which folder is removed. It is bound
to its project's folder and to its user: in a copy of the folder it names no cluster, and another user's is refused.
"""

from __future__ import annotations

import dataclasses
import os
import pwd
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal import storage
from shoal.cluster import processes, ray_edge
from shoal.errors import AccessError, ClusterError, CorruptError, NotFoundError, StorageError
from shoal.storage.owner import boot_id, start_ticks

RECORD_ENV = processes.RECORD
RECORD_NAME = "cluster.json"
TOKEN_NAME = "token"
"""Of the file in a cluster's private folder that holds its token."""
_FORMAT = 2
_CLUSTER_ID = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class ProcessRef:
    """One process, told apart from a later one with the same id by when it started."""

    pid: int
    started: int
    """In clock ticks since that boot: a time of day would move when the clock is set."""
    boot: str
    """8 hex digits of the kernel's boot id."""

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """Name a live process; None when it has ended."""
        started = start_ticks(pid)
        return None if started is None else cls(pid=pid, started=started, boot=boot_id())

    def is_alive(self) -> bool:
        """Whether that very process still runs; a zombie does not."""
        return self.boot == boot_id() and start_ticks(self.pid) == self.started


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """A running cluster: where it listens, where it keeps things, and what it was started from."""

    cluster_id: str
    """Random, 16 hex digits; every process of the cluster has it as SHOAL_CLUSTER_ID. Empty if it is foreign."""
    name: str
    project: Path
    """Folder that holds ``cluster.yaml``; absolute."""
    address: str
    """Of the GCS, "127.0.0.1:port": what ``ray.init`` takes."""
    dashboard_url: str
    serve_url: str
    serve_port: int
    storage: Path
    """Absolute."""
    tracking: str
    """MLflow's URI: ``sqlite:////abs/path`` or a server's URL."""
    token_path: Path
    run_dir: Path
    """Private folder of this cluster under the temporary directory: token, Ray's session, sockets, logs."""
    session_dir: Path
    """Ray's session folder, with its logs."""
    ports: Mapping[str, int] = field(repr=False)
    started: float
    """Epoch seconds."""
    num_cpus: int
    num_gpus: int
    pids: Mapping[str, ProcessRef] = field(repr=False)
    """The processes without which there is no cluster: ``gcs`` and ``raylet``."""
    ray_version: str
    python_version: str
    config: Mapping[str, Any] = field(repr=False)
    """The resolved ``cluster.yaml`` it was started from."""

    @property
    def is_foreign(self) -> bool:
        """Whether shoal did not start it: this process is a job on it (`shoal.cluster.guest`)."""
        return not self.cluster_id

    @property
    def record(self) -> Path:
        """The file that holds this record."""
        return state_dir(self.project) / RECORD_NAME

    def is_alive(self) -> bool:
        """Whether its head processes run; says nothing about whether they answer. Takes milliseconds."""
        return all(ref.is_alive() for ref in self.pids.values())

    def to_json(self) -> dict[str, Any]:
        """As plain data for the record."""
        plain = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(self).items()
        }
        return {"format": _FORMAT, **plain}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClusterInfo:
        """Read what ``to_json`` wrote of a cluster of this user on this machine.

        Raises:
            KeyError, TypeError, ValueError: it is not such a record.
        """
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']!r}, this shoal reads {_FORMAT}")
        fields = {key: value for key, value in data.items() if key != "format"}
        for key in ("project", "storage", "token_path", "run_dir", "session_dir"):
            fields[key] = Path(fields[key])
        fields["pids"] = {name: ProcessRef(**ref) for name, ref in fields["pids"].items()}
        info = cls(**fields)
        info._check_trust()
        return info

    def _check_trust(self) -> None:
        """Raise ValueError for a record that ``up`` of this user would not write, whoever wrote it."""
        run_dir = run_dir_of(self.cluster_id)
        if self.run_dir != run_dir or self.token_path != run_dir / TOKEN_NAME:
            raise ValueError(
                f"its folder is {self.run_dir} with {self.token_path}, and a cluster of this user has {run_dir}"
            )
        for folder in (run_dir.parent, run_dir):
            check_private(folder)
        if self.pids.keys() != set(ray_edge.HEAD_PROCESSES.values()):
            raise ValueError(f"it names the processes {sorted(self.pids)}, not gcs and raylet")
        if not all(type(ref.pid) is type(ref.started) is int for ref in self.pids.values()):
            raise ValueError("its process ids are no numbers")
        listening = {"address": self.address, "dashboard_url": self.dashboard_url.removeprefix("http://")}
        for name, where in listening.items():
            if not re.fullmatch(rf"{re.escape(ray_edge.LOOPBACK)}:[0-9]{{1,5}}", where):
                raise ValueError(f"{name} is {where!r}, not a port of {ray_edge.LOOPBACK}")

    @classmethod
    def from_env(cls) -> ClusterInfo | None:
        """The cluster that this process is part of or attached to; None when there is none.

        Raises:
            AccessError: the environment names another user's record.
            ClusterError: the environment names a record that cannot be read.
        """
        path = os.environ.get(RECORD_ENV)
        if not path:
            return None
        info = read_record(Path(path))
        if info is None:
            raise ClusterError(
                f"{RECORD_ENV}={path} names a cluster that is gone. Unset {RECORD_ENV}, or start it: shoal up"
            )
        return info


def runtime_root() -> Path:
    """The folder of this user's clusters under /tmp (not TMPDIR: on some machines too long for sockets)."""
    return Path("/tmp") / f"shoal-{os.getuid()}"


def run_dir_of(cluster_id: str) -> Path:
    """The private folder of a cluster of this user; short, because unix sockets live below it.

    Raises:
        ValueError: that is not the id of a cluster; what is removed with the cluster must not be anything else.
    """
    if _CLUSTER_ID.fullmatch(cluster_id) is None:
        raise ValueError(f"cluster_id {cluster_id!r} is not 16 hex digits")
    return runtime_root() / cluster_id[:8]


def check_private(folder: Path) -> None:
    """Pass if the folder is this user's own, or not there at all.

    Raises:
        ValueError: it is a link, or another user's, or no folder: someone else could swap what is in it.
    """
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(
            f"{folder} must be a folder of this user (uid {os.getuid()}), found "
            f"{stat.filemode(found.st_mode)} of uid {found.st_uid}"
        )


def state_dir(project: Path) -> Path:
    """Where a project's cluster is recorded."""
    return project / ".shoal"


def read_record(path: Path) -> ClusterInfo | None:
    """The record in a file; None when there is none, or it is that of another folder, of which this is a copy.

    Raises:
        AccessError: the file is another user's.
        ClusterError: the file is no record; it says what to do.
    """
    check_own(path)
    try:
        info = ClusterInfo.from_json(storage.read_json(path))
        return info if is_folder(path.parent.parent, info.project) else None
    except NotFoundError:
        return None
    except (CorruptError, StorageError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{path} is not a record that this shoal wrote for this user ({error}). "
            f"Run `shoal down` in {path.parent.parent} to clean up, then `shoal up`."
        ) from error


def check_own(path: Path) -> None:
    """Pass if a file of a project's cluster is this user's, or not there.

    Raises:
        AccessError: it is another user's, and so is the cluster: root, who could end it, was not asked to.
    """
    try:
        owner = path.lstat().st_uid
    except OSError:  # not there; or whoever reads it next says why it cannot be read
        return
    if owner != os.getuid():
        raise AccessError(
            f"{path} belongs to {_user(owner)}, and so does the cluster that it records; you are "
            f"{_user(os.getuid())}. Nothing was changed. Run shoal as that user; if no cluster of theirs runs "
            "here any more, remove the file."
        )


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name!r}"
    except KeyError:
        return f"the user with id {uid}"


def is_folder(here: Path, recorded: Path) -> bool:
    """Whether ``here`` is the very folder ``recorded``, under whatever name, and not a copy of it."""
    try:
        return here.samefile(recorded)
    except OSError:  # it was moved or removed; what is here is another one now
        return False


def find(project: Path) -> ClusterInfo | None:
    """The running cluster of a project; None when none runs (a record left by a crash does not count).

    Raises:
        AccessError: there is a record, and it is another user's.
        ClusterError: there is a record and it cannot be read.
    """
    info = read_record(state_dir(project.resolve()) / RECORD_NAME)
    return info if info is not None and info.is_alive() else None


def environment(info: ClusterInfo) -> dict[str, str]:
    """What a client process must set: for ``ray job submit``, ``serve deploy`` and ``ray status`` alike.

    Never holds the cluster's id: a shell that had it would be ended by ``shoal down``.
    """
    return {
        **ray_edge.auth_environment(info.token_path),
        **ray_edge.node_environment(),
        "RAY_ADDRESS": info.address,
        "RAY_API_SERVER_ADDRESS": info.dashboard_url,
        "RAY_DASHBOARD_ADDRESS": info.dashboard_url,
        RECORD_ENV: str(info.record),
    }


def driver_environment(info: ClusterInfo) -> dict[str, str]:
    """What a process sets that becomes a driver: also Serve's flags, which Serve's client code reads too.

    Nothing on a foreign cluster, where Ray has set what a job needs.
    """
    if info.is_foreign:
        return {}
    return {
        **environment(info),
        **ray_edge.serve_environment(info.ports, info.run_dir, haproxy_threads(info.num_cpus)),
    }


def haproxy_threads(num_cpus: int) -> int:
    """Threads for HAProxy: few, it is C and shares the machine with replicas and training."""
    return max(1, min(4, num_cpus // 2))


def differences(info: ClusterInfo, config: Mapping[str, Any]) -> list[str]:
    """Where a resolved config differs from the one the cluster runs with: "path: running 1, file 2"."""
    found = storage.differences(info.config, config)
    return [f"{path}: running {has}, file {wants}" for path, has, wants in sorted(found)]


def check_versions(info: ClusterInfo) -> None:
    """Check that this process can talk to the cluster at all.

    Raises:
        ClusterError: Ray or Python differ from the cluster's; Ray would fail later and obscurely.
    """
    here = {"Ray": ray_edge.installed_ray_version(), "Python": python_version()}
    there = {"Ray": info.ray_version, "Python": info.python_version}
    wrong = [
        f"{what} {here[what]} here, {there[what]} in the cluster"
        for what in here
        if here[what] != there[what]
    ]
    if wrong:
        raise ClusterError(
            f"cluster {info.name!r} was started by another environment: {'; '.join(wrong)}. "
            f"Use the environment it was started from, or restart it with this one: shoal down && shoal up"
        )


def python_version() -> str:
    """Of this interpreter, as Ray compares it: "3.11.9"."""
    return ".".join(str(part) for part in sys.version_info[:3])
