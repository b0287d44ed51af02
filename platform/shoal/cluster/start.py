"""Start a local cluster: folders, token, ports, `ray start`, and the wait until it answers."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from shoal.cluster import dashboard, processes, ray_edge
from shoal.cluster import info as cluster_info
from shoal.cluster import ports as port_plan
from shoal.cluster.info import ClusterInfo, ProcessRef
from shoal.errors import AccessError, ClusterError

START_DEADLINE_S = 120.0
"""A start takes about 10 s on two cores; on a machine busy with tests several times that."""
_MAX_START_TRIES = 3
_PORTS_RECORD = "ports.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StartPlan:
    """Everything about a cluster that is decided before its first process starts."""

    cluster_id: str
    name: str
    project: Path
    storage: Path
    tracking: str
    serve_host: str
    """Where Serve listens: loopback, unless the file says otherwise and has keys (checked by the config)."""
    serve_port: int
    """0 takes a free one."""
    num_cpus: int
    num_gpus: int
    config: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        """This cluster's private folder."""
        return cluster_info.run_dir_of(self.cluster_id)


def start(plan: StartPlan, say: Callable[[str], None]) -> ClusterInfo:
    """Start the cluster and return it once it answers; its record is not written yet.

    On any error nothing of it is left running, and its folder is kept for its logs; `shoal down`, or the next
    `shoal up`, removes it.

    Raises:
        ClusterError: it does not start, does not answer in time, or would listen beyond this machine.
    """
    private_dir(cluster_info.runtime_root())
    for _ in range(_MAX_START_TRIES):
        private_dir(plan.run_dir)
        ports = _reserve_ports(plan)
        try:
            return _start_once(plan, ports, say)
        except _PortRace as race:
            _log.warning("starting again on other ports: %s", race)
            abandon(plan.cluster_id)
        except BaseException:
            processes.stop(plan.cluster_id, grace_s=0.0, deadline_s=20.0)
            (plan.run_dir / _PORTS_RECORD).unlink(missing_ok=True)
            raise
    raise ClusterError(
        f"cluster {plan.name!r} did not start: {_MAX_START_TRIES} times another program took one of its "
        f"ports in between. Try again; `shoal doctor` shows who holds which port."
    )


def abandon(cluster_id: str) -> None:
    """End every process of a cluster and remove its folder. Safe to repeat, and for a cluster half started.

    Raises:
        ClusterError: a process does not end, even on SIGKILL.
        ValueError: that is not the id of a cluster; nothing was done.
    """
    run_dir = cluster_info.run_dir_of(cluster_id)
    left = processes.stop(cluster_id, grace_s=3.0, deadline_s=20.0)
    if left:
        raise ClusterError(
            f"these processes of cluster {cluster_id} do not end: {processes.describe(left)}. "
            f"They hang in the kernel or belong to another user; end them and run `shoal down` again."
        )
    shutil.rmtree(run_dir, ignore_errors=True)  # which refuses a link


def private_dir(path: Path) -> None:
    """Make a folder that only we can read, or accept one that is already so.

    Raises:
        ClusterError: it is a link, or another user's, or no folder: someone else could swap what is in it.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    try:
        cluster_info.check_private(path)
    except ValueError as error:
        raise ClusterError(f"{error}. Look who made it, and remove it.") from error
    if stat.S_IMODE(path.lstat().st_mode) != 0o700:
        path.chmod(0o700)


def answers(dashboard_url: str, token_path: Path) -> bool:
    """Whether the dashboard answers to this token now, and the GCS behind it."""
    try:
        # Read from the GCS: a dashboard outlives a killed GCS by seconds, and would tell its own version meanwhile.
        dashboard.get(dashboard_url, ray_edge.STATUS_PATH, token_path)
    except (ClusterError, AccessError):
        return False
    return True


def cluster_process_environment(plan: StartPlan, ports: dict[str, int], token_path: Path) -> dict[str, str]:
    """The environment of the cluster's processes: the caller's, without another Ray's settings, plus ours."""
    ours = {
        **ray_edge.auth_environment(token_path),
        **ray_edge.node_environment(),
        **ray_edge.serve_environment(ports, plan.run_dir, cluster_info.haproxy_threads(plan.num_cpus)),
        **ray_edge.cluster_environment(ports, plan.run_dir, plan.serve_host),
        cluster_info.RECORD_ENV: str(cluster_info.state_dir(plan.project) / cluster_info.RECORD_NAME),
        processes.CLUSTER_ID: plan.cluster_id,
        # As in an activated environment: `python` in a job's entrypoint is this one.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": ray_edge.python_path(plan.project, os.environ.get("PYTHONPATH")),
    }
    inherited = {name: value for name, value in os.environ.items() if name not in ray_edge.CLIENT_VARIABLES}
    return {**inherited, **ours}


class _PortRace(Exception):
    """Another program took one of our ports between the check and the start."""


def _start_once(plan: StartPlan, ports: dict[str, int], say: Callable[[str], None]) -> ClusterInfo:
    began = time.monotonic()
    token_path = _write_token(plan.run_dir)
    _write_launcher(
        plan.run_dir / ray_edge.HAPROXY_LAUNCHER, ray_edge.haproxy_launcher(ray_edge.haproxy_binary())
    )
    private_dir(plan.run_dir / ray_edge.HAPROXY_DIR)
    _write_launcher(plan.run_dir / ray_edge.WORKER_LAUNCHER, ray_edge.worker_launcher(plan.run_dir))
    command = ray_edge.start_command(ports, plan.run_dir, num_cpus=plan.num_cpus, num_gpus=plan.num_gpus)
    say(f"starting cluster {plan.name!r}: {plan.num_cpus} CPUs, {plan.num_gpus} GPUs")
    log_path = plan.run_dir / "start.log"
    with log_path.open("wb") as log:
        try:
            code = subprocess.run(
                command,
                env=cluster_process_environment(plan, ports, token_path),
                cwd=plan.project,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in this terminal must not reach the cluster later
                timeout=START_DEADLINE_S,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    if code != 0:
        raise _start_failure(plan, ports, code, log_path)
    _wait_answer(plan, ports, token_path, deadline=began + START_DEADLINE_S)
    _check_listeners(plan)
    return _describe(plan, ports, token_path)


def _start_failure(plan: StartPlan, ports: dict[str, int], code: int | None, log_path: Path) -> Exception:
    ours = {process.pid for process in processes.find(plan.cluster_id)}
    for name in ray_edge.FIXED_PORTS:
        if name != "serve" and not port_plan.is_free(ports[name]):
            listening = port_plan.holder_pid(ports[name])
            if listening is not None and listening not in ours:
                return _PortRace(f"{name} port {ports[name]} is held by {port_plan.holder(ports[name])}")
    ended = (
        f"`ray start` ended with code {code}"
        if code is not None
        else f"no end within {START_DEADLINE_S:.0f} s"
    )
    tail = log_path.read_text(errors="replace")[-2000:].strip()
    return ClusterError(
        f"cluster {plan.name!r} did not start: {ended}. Its last words:\n{tail}\n"
        f"Logs: {plan.run_dir}. Next: shoal doctor"
    )


def _wait_answer(plan: StartPlan, ports: dict[str, int], token_path: Path, *, deadline: float) -> None:
    url = f"http://{ray_edge.LOOPBACK}:{ports['dashboard']}"
    while not answers(url, token_path):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"cluster {plan.name!r} started and its dashboard at {url} did not answer within "
                f"{START_DEADLINE_S:.0f} s. Logs: {ray_edge.ray_dir(plan.run_dir)}. Next: shoal doctor"
            )
        time.sleep(0.1)


def _check_listeners(plan: StartPlan) -> None:
    """Refuse a cluster that others could reach; a changed Ray or an odd network must not open it silently."""
    exposed = [listener for listener in processes.listeners(plan.cluster_id) if not listener.is_loopback]
    if exposed:
        listed = ", ".join(f"{item.process} on {item.address}:{item.port}" for item in exposed)
        raise ClusterError(
            f"cluster {plan.name!r} was stopped again, because it listened beyond this machine: {listed}. "
            f"This is a fault in shoal or a Ray it was not made for (made for {ray_edge.RAY_VERSION}); "
            f"please report it."
        )


def _describe(plan: StartPlan, ports: dict[str, int], token_path: Path) -> ClusterInfo:
    heads: dict[str, ProcessRef] = {}
    for process in processes.find(plan.cluster_id):
        with suppress(psutil.Error):
            role = ray_edge.HEAD_PROCESSES.get(process.name())
            if role is not None and (head := ProcessRef.of(process.pid)) is not None:
                heads[role] = head
    if heads.keys() != set(ray_edge.HEAD_PROCESSES.values()):
        raise ClusterError(
            f"cluster {plan.name!r} answered and then lost a head process (left: {sorted(heads)}). "
            f"Logs: {ray_edge.ray_dir(plan.run_dir)}"
        )
    return ClusterInfo(
        cluster_id=plan.cluster_id,
        name=plan.name,
        project=plan.project,
        address=f"{ray_edge.LOOPBACK}:{ports['gcs']}",
        dashboard_url=f"http://{ray_edge.LOOPBACK}:{ports['dashboard']}",
        serve_url=f"http://{_reachable(plan.serve_host)}:{ports['serve']}",
        serve_port=ports["serve"],
        storage=plan.storage,
        tracking=plan.tracking,
        token_path=token_path,
        run_dir=plan.run_dir,
        session_dir=ray_edge.session_dir(plan.run_dir),
        ports=ports,
        started=time.time(),
        num_cpus=plan.num_cpus,
        num_gpus=plan.num_gpus,
        pids=heads,
        ray_version=ray_edge.installed_ray_version(),
        python_version=cluster_info.python_version(),
        config=plan.config,
    )


def _reachable(host: str) -> str:
    """The address at which a client on this machine reaches a server that listens on ``host``."""
    if host in ("0.0.0.0", "::"):
        return ray_edge.LOOPBACK
    return f"[{host}]" if ":" in host else host


def _reserve_ports(plan: StartPlan) -> dict[str, int]:
    """Choose ports and write them down where this user's other clusters look; call under the user's lock."""
    taken = []
    for path in cluster_info.runtime_root().glob(f"*/{_PORTS_RECORD}"):
        with suppress(OSError, ValueError, KeyError):
            taken.append(int(json.loads(path.read_text())["block"]))
    chosen = port_plan.choose(serve_port=plan.serve_port, taken_blocks=taken)
    if chosen is None:
        raise ClusterError(
            f"no free block of {port_plan.BLOCK_SIZE} ports for cluster {plan.name!r}: {len(taken)} clusters "
            f"of this user hold one each, other programs the rest. Stop one: shoal down"
        )
    block, ports = chosen
    (plan.run_dir / _PORTS_RECORD).write_text(json.dumps({"block": block}))
    return ports


def _write_token(run_dir: Path) -> Path:
    path = run_dir / cluster_info.TOKEN_NAME
    path.unlink(missing_ok=True)
    # O_EXCL and the mode at creation: there is no moment at which another user could read or plant it.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _write_launcher(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o700)


def answers_within(info: ClusterInfo, *, timeout_s: float) -> bool:
    """Whether a recorded cluster answers and lives on; asks again until ``timeout_s``, for a machine that is busy.

    A process that was killed counts as alive until the kernel is done with it, so a look at the processes alone
    would find a cluster that is dying.
    """
    deadline = time.monotonic() + timeout_s
    while not answers(info.dashboard_url, info.token_path):
        if time.monotonic() > deadline or not info.is_alive():
            return False
        time.sleep(0.2)
    return info.is_alive()
