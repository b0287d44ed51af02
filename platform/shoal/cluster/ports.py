"""Ports of a cluster: a block of numbers per cluster, so that several clusters on a machine never meet.

A block lies below the kernel's own range for outgoing connections, so nothing takes a number by accident
between choosing and binding. Blocks of this user's clusters are disjoint by record (each cluster writes its
block before it starts); those of other users are avoided by trying to bind.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable
from pathlib import Path

import psutil

from shoal.cluster import ray_edge

FIRST_PORT = 10_000
BLOCK_SIZE = 256
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_MAX_TRIES = 40


def block_starts() -> list[int]:
    """First ports of every block on this machine."""
    end = 32_768
    if _EPHEMERAL_RANGE.exists():
        end = int(_EPHEMERAL_RANGE.read_text().split()[0])
    end = max(end, FIRST_PORT + 4 * BLOCK_SIZE)  # a machine set up otherwise still gets some choice
    return list(range(FIRST_PORT, end - BLOCK_SIZE + 1, BLOCK_SIZE))


def plan(start: int, *, serve_port: int) -> dict[str, int]:
    """The ports of a cluster whose block begins at ``start``; ``serve_port`` 0 takes one of the block."""
    assert (
        len(ray_edge.FIXED_PORTS) + ray_edge.NUM_REPLICA_PORTS + ray_edge.NUM_REPLICA_GRPC_PORTS <= BLOCK_SIZE
    )
    ports = {name: start + offset for offset, name in enumerate(ray_edge.FIXED_PORTS)}
    ports[ray_edge.REPLICA_GRPC_PORTS] = start + len(ray_edge.FIXED_PORTS)
    ports[ray_edge.REPLICA_PORTS] = start + BLOCK_SIZE - ray_edge.NUM_REPLICA_PORTS
    if serve_port:
        ports["serve"] = serve_port
    return ports


def choose(*, serve_port: int, taken_blocks: Iterable[int]) -> tuple[int, dict[str, int]] | None:
    """Pick a block that is nobody's and whose fixed ports can be bound now; None when none is left.

    ``taken_blocks`` are the first ports of blocks that this user's other clusters hold.
    """
    free = sorted(set(block_starts()) - set(taken_blocks))
    random.shuffle(free)
    for start in free[:_MAX_TRIES]:
        ports = plan(start, serve_port=serve_port)
        if all(is_free(ports[name]) for name in ray_edge.FIXED_PORTS if name != "serve" or not serve_port):
            return start, ports
    return None


def is_free(port: int) -> bool:
    """Whether a listener on loopback could bind ``port`` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a connection of an earlier server in TIME_WAIT does not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ray_edge.LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def holder_pid(port: int) -> int | None:
    """Which process listens on ``port``; None when none does, or the kernel does not tell us."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN
        if listens and connection.pid and tuple(connection.laddr)[1:2] == (port,):
            return int(connection.pid)
    return None


def holder(port: int) -> str | None:
    """Who listens on ``port``, as "name (pid 12): command"; None when nobody does or we may not know."""
    pid = holder_pid(port)
    if pid is None:
        return None
    try:
        process = psutil.Process(pid)
        command = " ".join(process.cmdline())[:120]
        return f"{process.name()} (pid {pid}): {command}"
    except psutil.Error:
        return f"pid {pid}"
