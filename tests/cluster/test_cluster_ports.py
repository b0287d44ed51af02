"""Ports of clusters: disjoint blocks, only free ones, and a name for who is in the way."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from shoal.cluster import ports, ray_edge


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind((ray_edge.LOOPBACK, 0))
        server.listen(1)
        yield server


def everything(plan: dict[str, int]) -> set[int]:
    """Every port a cluster may ever listen on, ranges of replicas included."""
    http, grpc = plan[ray_edge.REPLICA_PORTS], plan[ray_edge.REPLICA_GRPC_PORTS]
    replicas = {
        *range(http, http + ray_edge.NUM_REPLICA_PORTS),
        *range(grpc, grpc + ray_edge.NUM_REPLICA_GRPC_PORTS),
    }
    return {plan[name] for name in ray_edge.FIXED_PORTS} | replicas


def test_every_port_of_a_cluster_is_its_own() -> None:
    plan = ports.plan(20_000, serve_port=0)
    ranges = ray_edge.NUM_REPLICA_PORTS + ray_edge.NUM_REPLICA_GRPC_PORTS
    assert len(everything(plan)) == len(ray_edge.FIXED_PORTS) + ranges


def test_two_blocks_share_no_port() -> None:
    first, second, *_ = ports.block_starts()
    assert not everything(ports.plan(first, serve_port=0)) & everything(ports.plan(second, serve_port=0))


def test_blocks_lie_below_the_kernels_own_range() -> None:
    low = int(ports._EPHEMERAL_RANGE.read_text().split()[0])
    if low < ports.FIRST_PORT + 4 * ports.BLOCK_SIZE:
        pytest.skip("this machine gives the kernel nearly every port")
    assert max(ports.block_starts()) + ports.BLOCK_SIZE <= low


def test_a_serve_port_that_was_asked_for_is_kept() -> None:
    assert ports.plan(20_000, serve_port=8123)["serve"] == 8123


def test_a_block_of_another_cluster_is_not_taken() -> None:
    *taken, left = ports.block_starts()
    chosen = ports.choose(serve_port=0, taken_blocks=taken)
    assert chosen is None or chosen[0] == left


def test_a_block_with_a_busy_port_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = ports.plan(10_000, serve_port=0)["haproxy_stats"]
    monkeypatch.setattr(ports, "block_starts", lambda: [10_000])
    monkeypatch.setattr(ports, "is_free", lambda port: port != busy)
    assert ports.choose(serve_port=0, taken_blocks=[]) is None


def test_no_block_left_is_none() -> None:
    assert ports.choose(serve_port=0, taken_blocks=ports.block_starts()) is None


def test_a_port_in_use_is_not_free(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert not ports.is_free(port)
    listener.close()
    assert ports.is_free(port)


def test_the_holder_of_a_port_is_named(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert ports.holder_pid(port) == os.getpid()
    assert f"(pid {os.getpid()})" in (ports.holder(port) or "")


def test_nobody_holds_a_free_port(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    assert ports.holder(port) is None
