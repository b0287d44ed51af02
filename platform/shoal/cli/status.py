"""``shoal status``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from shoal.cli.command import CLUSTER, command
from shoal.cli.console import duration_text, say, show_facts, show_table
from shoal.cli.project import require_running
from shoal.errors import ShoalError, TrackingError

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo, ClusterStatus
    from shoal.tracking import RunRecord, TrackerStatus

NUM_RUNS = 5
"""Runs that are not running, shown beside those that are."""
TRACKER_TIMEOUT_S = 5.0
"""A tracker on a busy machine answers later; the command does not wait for it."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, panel=CLUSTER, examples=("shoal status",))(status)


def status() -> None:
    """Show the cluster: what it has, who holds what, its runs, its apps and where they answer."""
    from shoal.cluster import status as look

    info = require_running()
    seen = look(info)
    _show_cluster(seen)
    say()
    _show_pools(info)
    say()
    _show_holders(seen)
    say()
    _show_runs(info)
    say()
    _show_apps(info)


def _show_cluster(seen: ClusterStatus) -> None:
    info = seen.info
    resources = ", ".join(
        f"{_amount(name, seen.free[name])} of {_amount(name, total)} {name}"
        for name, total in seen.total.items()
    )
    show_facts(
        {
            "cluster": f"{info.name}, up for {duration_text(seen.uptime_s)}, {seen.num_processes} processes",
            "free": resources,
            "dashboard": info.dashboard_url,
            "apps": info.serve_url,
            "storage": info.storage,
            "tracking": _tracking_text(info),
        }
    )


def _tracking_text(info: ClusterInfo) -> str:
    """Where MLflow is and how far delivery is; a tracker that does not answer must not hide the rest."""
    from shoal.cluster import attach
    from shoal.tracking import ensure_tracker

    try:
        attach(info, timeout_s=TRACKER_TIMEOUT_S)
        return delivery_text(ensure_tracker(info, timeout_s=TRACKER_TIMEOUT_S).status())
    except TrackingError:
        why = f"no answer within {TRACKER_TIMEOUT_S:g} s; the tracker is starting, or the machine is busy"
    except ShoalError as error:
        why = str(error)
    return f"{info.tracking}\nunknown how much waits: {why}"


def delivery_text(status: TrackerStatus) -> str:
    """How much of the runs MLflow does not know yet, why, and what it never will."""
    from shoal.storage.disk import size_text

    lines = [status.uri]
    if status.behind_runs:
        lines.append(f"waiting: {size_text(status.behind_bytes)} of {status.behind_runs} runs")
    elif status.state == "ok":
        lines[0] += ", knows every run"
    if status.error:
        lines.append(f"tries again: {status.error}")
    if status.warnings:
        lines.append(f"{len(status.warnings)} warnings, the last: {status.warnings[-1]}")
    return "\n".join(lines)


def _show_pools(info: ClusterInfo) -> None:
    from shoal.config import ClusterConfig, Machine
    from shoal.config.local import plan_local

    config = ClusterConfig.from_dict(info.config)
    if not config.pools:
        say("no pools in cluster.yaml: the head does the work")
        return
    plan = plan_local(config, Machine.here())
    rows = [
        (name, f"{pool.nodes}", plan.pools[name].num_cpus, plan.pools[name].num_gpus)
        for name, pool in config.pools.items()
    ]
    show_table(
        ("pool", "nodes in the file", "CPUs here", "GPUs here"), rows, numbers=("CPUs here", "GPUs here")
    )


def _show_holders(seen: ClusterStatus) -> None:
    holding = [holder for holder in seen.holders if any(holder.resources.values())]
    if not holding:
        say("nobody holds anything")
        return
    rows = [
        (
            holder.name,
            holder.kind,
            ", ".join(f"{_amount(name, amount)} {name}" for name, amount in holder.resources.items()),
        )
        for holder in holding
    ]
    show_table(("holder", "kind", "holds"), rows)


def _show_runs(info: ClusterInfo) -> None:
    from shoal.cli.runs import show_runs
    from shoal.storage import Storage
    from shoal.tracking import list_runs

    place = Storage(info.storage)
    records = list_runs(place)
    running = [record for record in records if _is_running(record)]
    shown = running + [record for record in records if record not in running][:NUM_RUNS]
    if not shown:
        say("no runs yet; start one: shoal train MODULE")
        return
    show_runs(shown, place)
    if len(shown) < len(records):
        say(f"and {len(records) - len(shown)} more: shoal runs")


def _is_running(record: RunRecord) -> bool:
    from shoal.tracking import RunState

    try:
        return record.state() == RunState.RUNNING
    except OSError:  # its row says that it is damaged
        return False


def _show_apps(info: ClusterInfo) -> None:
    from shoal.serve import apps

    rows = [(app.name, app.status().state, app.model, app.url) for app in apps(info)]
    if rows:
        show_table(("app", "state", "model", "url"), rows)
    else:
        say("no apps yet; start one: shoal serve MODULE:APP --model MODEL@ALIAS")


def _amount(resource: str, amount: float) -> str:
    from shoal.storage.disk import size_text

    return size_text(amount) if resource == "memory" else f"{amount:g}"
