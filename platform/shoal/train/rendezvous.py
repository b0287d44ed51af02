"""Where the workers of a run meet, and meet again when one was replaced: survivors keep their processes.

The controller opens a store that outlives every worker and calls one *generation* after the other: all seats
are taken, form a process group. A worker that lost a peer leaves its group, says so, and waits for the next call.
`docs/training.md` has the whole story. No Ray here.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

from shoal.errors import PeerLost

_GENERATION = "generation"
_CLOSED = -1
_POLL_S = 0.01

GATHER_TIMEOUT_S = 4 * 3600.0
"""How long a worker waits for the next generation to be called and all its seats to be taken. Peers may still build
their data, which has no limit of ours, and notice a death only then; a dead controller is noticed at once."""

JOIN_TIMEOUT_S = 20.0
"""How long forming the group may take once all seats are taken; longer means that one died that had its seat."""


@dataclass(frozen=True)
class Place:
    """Which of a group's workers one is; ``local_rank`` among those of its node."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int


def places(nodes: list[str]) -> list[Place]:
    """The place of each worker, from the node of each by rank."""
    order = list(dict.fromkeys(nodes))
    return [
        Place(rank, len(nodes), nodes[:rank].count(node), nodes.count(node), order.index(node))
        for rank, node in enumerate(nodes)
    ]


@dataclass(frozen=True)
class Seat:
    """A worker's place, and what it needs to meet the others: address and port of the store among it."""

    place: Place
    address: str
    port: int
    backend: str
    timeout_s: float
    """Of collectives, and of joining."""
    after: int
    """The generation that was called last: who takes this seat joins a later one."""

    def environment(self) -> dict[str, str]:
        """The usual variables, as ``torchrun`` sets them."""
        variables = {
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "RANK": str(self.place.rank),
            "WORLD_SIZE": str(self.place.size),
            "LOCAL_RANK": str(self.place.local_rank),
            "LOCAL_WORLD_SIZE": str(self.place.local_size),
            "NODE_RANK": str(self.place.node_rank),
        }
        if self.address.startswith("127."):
            # Left alone, both bind what the host name resolves to.
            variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        return variables


class Rendezvous:
    """The controller's side: a store on ``address``, on a free port."""

    def __init__(self, address: str) -> None:
        self._address = address
        # torch's own would listen on every interface, whatever its host name says.
        listener = socket.create_server((address, 0), backlog=128)
        self._port = int(listener.getsockname()[1])
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            address, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._generation = 0
        self._store.set(_GENERATION, "0")

    def seat(self, place: Place, *, backend: str, timeout_s: float) -> Seat:
        """What the worker in that place must be told."""
        return Seat(place, self._address, self._port, backend, timeout_s, self._generation)

    def call(self) -> None:
        """Let every worker that has a seat join a new process group."""
        self._generation += 1
        self._store.set(_GENERATION, str(self._generation))

    def close(self) -> None:
        """Send home whoever waits for a call, now or later."""
        self._store.set(_GENERATION, str(_CLOSED))


class Attendance:
    """A worker's side: joins one generation after the other."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._generation = seat.after
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            seat.address, seat.port, is_master=False, timeout=timedelta(seconds=seat.timeout_s)
        )

    def join(self) -> None:
        """Become a member of the next generation that is called and complete. Blocks.

        Raises:
            PeerLost: there will be none: every worker has lost the others, the controller sends all home, is gone
                itself, or did not call within `GATHER_TIMEOUT_S`.
        """
        deadline = time.monotonic() + GATHER_TIMEOUT_S
        try:
            while not self._form_next(deadline):
                pass
        except RuntimeError as err:  # torch's errors of stores
            raise PeerLost(f"no group to join ({str(err).splitlines()[0][:200]})") from None

    def leave(self) -> None:
        """Leave the group whose member was lost, and say so."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self._store.set(f"lost/{self._generation}/{self._seat.place.rank}", "")

    def _form_next(self, deadline: float) -> bool:
        """Become a member of the next generation; False if that cannot be, as one that took its seat has died."""
        generation = self._next_complete(deadline)
        if generation is None:
            return False
        self._generation = generation
        try:
            dist.init_process_group(
                self._seat.backend,
                store=dist.PrefixStore(f"group/{generation}", self._store),  # type: ignore[attr-defined]
                rank=self._seat.place.rank,
                world_size=self._seat.place.size,
                timeout=timedelta(seconds=min(JOIN_TIMEOUT_S, self._seat.timeout_s)),
            )
        except RuntimeError:
            self.leave()
            return False
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self._seat.timeout_s))
        return True

    def _next_complete(self, deadline: float) -> int | None:
        """Wait for a new generation, take the seat, wait for the others; None if a newer one was called meanwhile."""
        while (called := self._called()) == self._generation:
            if self._everybody(f"lost/{self._generation}"):
                raise PeerLost("every worker lost the others")
            _pause(deadline, f"generation {self._generation + 1} of its group to be called")
        self._store.set(f"here/{called}/{self._seat.place.rank}", "")
        while not self._everybody(f"here/{called}"):
            if self._called() != called:
                return None
            _pause(deadline, f"the other workers of generation {called}")
        return called

    def _called(self) -> int:
        generation = int(self._store.get(_GENERATION))
        if generation == _CLOSED:
            raise PeerLost("the group will not meet again")
        return generation

    def _everybody(self, what: str) -> bool:
        return bool(self._store.check([f"{what}/{rank}" for rank in range(self._seat.place.size)]))


def _pause(deadline: float, awaited: str) -> None:
    if time.monotonic() > deadline:
        raise PeerLost(f"a worker waited {GATHER_TIMEOUT_S:g} s for {awaited}")
    time.sleep(_POLL_S)


_seat: Seat | None = None  # this process's; given to it before its training function starts


def take_seat(seat: Seat) -> None:
    """In a worker process: this is your place."""
    global _seat
    _seat = seat
    os.environ.update(seat.environment())


def run_in_generations(fn: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
    """In a worker process that has a seat: run ``fn`` with its peers, and again from the start when one was lost.

    ``fn`` runs with ``torch.distributed`` initialised, with a copy of ``config``: what an interrupted call did to
    it does not reach the next. Blocks.

    Raises:
        PeerLost: a peer was lost, and `Attendance.join` found no group after that.
    """
    assert _seat is not None, "take_seat() comes first"
    attendance = Attendance(_seat)
    gc.freeze()  # what is imported by now is no garbage: looking through it takes 0.2 s
    while True:
        attendance.join()
        if _ends(functools.partial(fn, copy.deepcopy(config))):
            return
        attendance.leave()
        gc.collect()  # the model of the interrupted call, before the next builds another
        torch._dynamo.reset()  # a replacement has compiled nothing yet, and must compute the same
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _ends(call: Callable[[], None]) -> bool:
    """False if it lost a peer. The error holds the call's frames, and they the model: it must not outlive this."""
    try:
        call()
    except PeerLost:
        return False
    return True
