"""Groups of workers in milliseconds: forked from a process that has imported torch and never trained.

``fleet.py`` is that process. It reads one `Group` a line from its standard input, as JSON, and answers with the exit
codes of its workers.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from projects import ROOT
from shoal.storage import Storage
from shoal.tracking import RunRecord
from shoal.train.bad_steps import OnNan
from shoal.train.spec import Strategy

KILLED = int(-signal.SIGKILL)
RAISED = 70


@dataclass(frozen=True, kw_only=True)
class Group:
    """One attempt at a run of `Elastic` recipes."""

    storage: str
    name: str
    workers: int
    steps: int
    batch_size: int
    shards: int | None = None
    resizes: dict[int, int] = field(default_factory=dict)
    """By step, how many workers are ordered to go on from its end."""
    poison: list[int] = field(default_factory=list)
    """Steps whose loss is NaN on rank 0."""
    on_nan: OnNan = "fail"
    die_at_step: int | None = None
    """In which ranks die by SIGKILL; with ``checkpoint_every_s``, once there is a checkpoint to go on from."""
    who_dies: list[int] | None = None
    """Of them; None: all."""
    checkpoint_every_s: float = 1e6
    """By default only what a resize or a survivor commits is there to go on from."""
    strategy: Strategy = "ddp"
    micro_batch: int | None = None
    machines: list[str] = field(default_factory=list)
    """What the rank's machine says that its name is; empty: the truth."""
    memory: int | None = None
    """How many samples at a time fit into rank 1's memory."""
    memory_in: str = "forward"
    """Where it is missed: there, in ``backward`` or in ``optimizer``."""
    unreadable: list[int] = field(default_factory=list)
    """Training samples whose loading raises."""
    kill_at: str = ""
    """Where rank 0 of a group that is resized dies: ``ordered``, ``committed``, ``written``; empty: nowhere."""


class Fleet:
    """The process that groups are forked from; `close` it."""

    def __init__(self) -> None:
        folders = (ROOT / "platform", ROOT / "tests", Path(__file__).parent)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, group: Group) -> list[int]:
        """Exit codes by rank. Blocks until all are gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(group)) + "\n")
        self._process.stdin.flush()
        codes: list[int] = json.loads(self._process.stdout.readline())
        return codes

    def train_elastic(self, group: Group) -> RunRecord:
        """As a driver does: start as many as were ordered, until nobody is to go on; all must end well."""
        record = RunRecord(Storage(Path(group.storage)), group.name)
        for _ in range(len(group.resizes) + 1):
            assert self.train(group) == [0] * group.workers
            resize = record.summary().resize
            if resize is None:
                return record
            group = replace(group, workers=resize["to"])
        raise AssertionError(f"resized more often than ordered: {record.events(('start', 'resize'))}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def serve() -> None:
    # What the workers need is imported once, here.
    import shoal.train.engine
    import toy_elastic  # noqa: F401

    for line in sys.stdin:
        told: dict[str, Any] = json.loads(line)
        told["resizes"] = {int(step): size for step, size in told["resizes"].items()}
        group = Group(**told)
        if group.strategy != "ddp":
            import shoal.train.sharded  # noqa: F401
        with tempfile.TemporaryDirectory() as folder:
            pids = [_fork(group, rank, Path(folder) / "rendezvous") for rank in range(group.workers)]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def _fork(group: Group, rank: int, rendezvous: Path) -> int:
    if pid := os.fork():
        return pid
    code = RAISED
    try:
        _work(group, rank, rendezvous)
        code = 0
    except BaseException as err:
        print(f"rank {rank}: {err!r}", file=sys.stderr)
    finally:
        os._exit(code)


def _work(group: Group, rank: int, rendezvous: Path) -> None:
    import torch.distributed as dist

    from shoal.train import cadence, checkpoints, reduce
    from shoal.train import group as room
    from shoal.train.engine import train_worker
    from shoal.train.spec import RunSpec
    from toy_elastic import ElasticToy, die_at

    cadence.STOP_POLL_S = 0.0  # look at every step: a toy's take less than a millisecond
    if group.workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=group.workers
        )
    if rank == 0:
        die_at(group.kill_at)
    ElasticToy.resizes = group.resizes
    ElasticToy.memory, ElasticToy.memory_in = group.memory, group.memory_in
    if group.memory is not None:
        reduce.BUCKET_BYTES = 1  # so that some of the gradients are on their way
    ElasticToy.unreadable = group.unreadable
    ElasticToy.poison = group.poison
    if group.who_dies is None or rank in group.who_dies:
        ElasticToy.die_at_step = group.die_at_step
    ElasticToy.has_checkpoints = group.checkpoint_every_s < 1e6
    if group.strategy != "ddp":
        checkpoints.BACKGROUND_MIN_BYTES = 0  # a toy is treated like a large model, which nobody has whole
    if group.machines:
        socket.gethostname = lambda: group.machines[rank]
    ElasticToy.record = RunRecord(Storage(Path(group.storage)), group.name)
    spec = RunSpec(
        recipe=ElasticToy(batch_size=group.batch_size),
        name=group.name,
        storage=Storage(Path(group.storage)),
        target_steps=group.steps,
        shards=group.shards,
        on_nan=group.on_nan,
        checkpoint_every_s=group.checkpoint_every_s,
        strategy=group.strategy,
        micro_batch=group.micro_batch,
        threads=1,
    )
    train_worker(spec, room.Group.current())
    if group.workers > 1:
        if dist.is_initialized():  # a worker whose peer is gone has left it
            dist.destroy_process_group()
        threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
        left = [name for name in threads if "gloo" in name]
        assert not left, f"the process group was left and lives on: {left}"


if __name__ == "__main__":
    serve()
