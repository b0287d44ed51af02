"""What a checkpoint costs the training, and how fast it is written, beside torch's own ways.

    python -m benchmarks.checkpoint [--rounds 8]

One process trains a transformer of 24M parameters with AdamW (288 MB of state), one thread; each round saves once in
every way, in an order drawn anew. *Stall*: by how much the loop took longer than its steps take without a save, from
the save until it is on the disk; so what a background write takes from the steps beside it counts. The median of the
steps between the saves of a round is what a step takes.

Ours is what a run does at a step boundary (`shoal.train`), in this loop. The ceiling of the disk is the same bytes
out of the same memory by a bare loop of read, SHA-256 and write, then fsync, in a process of the same niceness, while
the training goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.ratios import paired_ratio
from shoal.recipe import minimize
from shoal.storage import DiskStore, Fence
from shoal.storage.background import NICENESS
from shoal.train.checkpoint_writer import CheckpointWriter
from shoal.train.checkpoints import Snapshot, take_snapshot, tensors_of
from shoal.train.staging import Staging

GOAL_SAVE, GOAL_BEST, GOAL_DISK = 20.0, 3.0, 0.9
"""Lower bounds: stall of torch.save + fsync / ours, the best peer's / ours, and bytes/s / the disk's ceiling."""
WIDTH, LAYERS, TOKENS = 576, 6, 32
STEPS_BETWEEN = 3
"""Steps without a save after each save."""
WAIT_S = 120.0
PLAIN_WRITE = """
import hashlib, os, sys
memory, size, niceness, target = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
os.nice(niceness)
digest, chunk = hashlib.sha256(), 4 * 2**20
print("ready", flush=True)
sys.stdin.readline()
with open(target, "wb", buffering=0) as file:
    for at in range(0, size, chunk):
        content = os.pread(memory, min(chunk, size - at), at)
        digest.update(content)
        file.write(content)
    os.fsync(file.fileno())
"""


class Training:
    """A loop that takes steps; `before_update` is called before each optimizer step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self._batch = torch.randn(1, TOKENS, WIDTH)
        self.before_update: Callable[[], None] = lambda: None

    def step(self) -> float:
        """Take a step; the seconds that it took."""
        began = time.perf_counter()
        loss = self.model(self._batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.before_update()
        self.optimizer.step()
        return time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """What the peers save."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


@dataclass
class Way:
    """One way to save: ``save`` returns when the training may go on; ``is_done`` when it is on the disk."""

    save: Callable[[Path], None]
    is_done: Callable[[], bool] = lambda: True
    before_update: Callable[[], None] = lambda: None
    stalls_s: list[float] = field(default_factory=list)


@contextlib.contextmanager
def ours(training: Training, folder: Path, write_s: list[float]) -> Iterator[tuple[Way, Staging]]:
    """shoal's, made ready as a run does after its first step."""

    def committed(snap: Snapshot, path: Path, size_bytes: int, seconds: float) -> None:
        write_s.append(seconds)

    def failed(snap: Snapshot, error: Exception) -> None:
        print(f"  shoal could not save: {error}", flush=True)

    token = Fence(DiskStore(folder / "fence")).take()
    token.begin({})
    writer = CheckpointWriter(
        folder / "shoal",
        keep=1,
        keep_best=1,
        objective=minimize("loss"),
        token=token,
        on_commit=committed,
        on_failure=failed,
    )
    staging = Staging()
    writer.prepare(staging, tensors_of(training.model, training.optimizer, None))
    number = 0

    def save(target: Path) -> None:
        nonlocal number
        number += 1
        writer.submit(
            take_snapshot(
                step=number, model=training.model, optimizer=training.optimizer, scheduler=None, facts={},
                run="", values={}, token=token, staging=staging, may_overlap=True,
            )
        )  # fmt: skip

    try:
        yield Way(save, lambda: not writer.is_writing, writer.finish_copying), staging
    finally:
        writer.end()
        staging.close()


def peers(training: Training) -> dict[str, Way]:
    """torch's ways, each made durable as its documentation says (dcp syncs its files by default)."""

    def plain(target: Path) -> None:
        with open(target, "wb") as file:
            torch.save(training.state(), file)
            file.flush()
            os.fsync(file.fileno())

    def asynchronous(kind: AsyncCheckpointerType, stager: DefaultStager | None = None) -> Way:
        under_way: list[Any] = []

        def save(target: Path) -> None:
            writer = dcp.FileSystemWriter(target)
            under_way[:] = [
                dcp.async_save(
                    training.state(), storage_writer=writer, async_checkpointer_type=kind, async_stager=stager
                )
            ]

        return Way(save, lambda: bool(under_way[0].done()) and under_way[0].result() is not None)

    def reused(*, is_shared: bool) -> DefaultStager:
        """Its memory serves every save; the other options need an accelerator."""
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=is_shared,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )

    return {
        "torch.save + fsync": Way(plain),
        "dcp.save": Way(lambda target: _saved(dcp.save(training.state(), checkpoint_id=target))),
        "dcp.async_save, thread": asynchronous(AsyncCheckpointerType.THREAD),
        "dcp.async_save, thread, memory reused": asynchronous(
            AsyncCheckpointerType.THREAD, reused(is_shared=False)
        ),
        "dcp.async_save, process": asynchronous(AsyncCheckpointerType.PROCESS),
        "dcp.async_save, process, memory reused": asynchronous(
            AsyncCheckpointerType.PROCESS, reused(is_shared=True)
        ),
    }


def _saved(_: object) -> None:
    pass


def stall_of(way: Way, training: Training, target: Path, usual_s: float) -> float:
    """Save once, and train until it is on the disk; the seconds beyond what the steps usually take."""
    training.before_update = way.before_update
    began, num_steps = time.perf_counter(), 0
    way.save(target)
    while num_steps == 0 or not way.is_done():
        training.step()
        num_steps += 1
        if time.perf_counter() - began > WAIT_S:
            raise SystemExit(f"{target.name}: not written after {WAIT_S:g} s")
    stall_s = time.perf_counter() - began - num_steps * usual_s
    training.before_update = lambda: None
    return stall_s


def plain_write_s(training: Training, memory: int, size_bytes: int, target: Path) -> float:
    """Seconds of the bare loop in its process, while the training goes on."""
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        PLAIN_WRITE,
        str(memory),
        str(size_bytes),
        str(NICENESS),
        str(target),
    ]
    with subprocess.Popen(
        command, pass_fds=[memory], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        began = time.perf_counter()
        process.stdin.write(b"\n")
        process.stdin.flush()
        ended: list[float] = []
        watch = _when_over(process, ended)
        while not ended:
            training.step()
        watch.join()
    return ended[0] - began


def _when_over(process: subprocess.Popen[bytes], ended: list[float]) -> threading.Thread:
    def wait() -> None:
        process.wait(WAIT_S)
        ended.append(time.perf_counter())

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def mean(values: list[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval (Student's t)."""
    from scipy.stats import t

    middle = statistics.fmean(values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return middle, middle - half, middle + half


def measure(
    training: Training, rounds: int, folder: Path
) -> tuple[dict[str, list[float]], list[tuple[float, float]]]:
    """Stalls in seconds by way, round by round; seconds of our background writes and of the bare loop's."""
    for _ in range(5):
        training.step()
    write_s: list[float] = []
    plain_s: list[float] = []
    draw = random.Random(0)
    with ours(training, folder, write_s) as (way, staging):
        ways = {"shoal": way, **peers(training)}
        for number in range(rounds + 1):
            usual_s = [training.step() for _ in range(2 * STEPS_BETWEEN)]
            stalls = {}
            for name in draw.sample(sorted(ways), len(ways)):
                target = folder / name.replace(" ", "-")
                usual = statistics.median(usual_s[-3 * STEPS_BETWEEN :])
                stalls[name] = stall_of(ways[name], training, target, usual)
                print(f"  round {number}: {name}: {stalls[name] * 1e3:.0f} ms", flush=True)
                shutil.rmtree(target, ignore_errors=True)
                target.unlink(missing_ok=True)
                usual_s += [training.step() for _ in range(STEPS_BETWEEN)]
            size_bytes = os.fstat(staging.memory).st_size
            plain = plain_write_s(training, staging.memory, size_bytes, folder / "plain")
            if number == 0:
                continue  # processes start, memory is touched for the first time: on every side
            plain_s.append(plain)
            for name, seconds in stalls.items():
                ways[name].stalls_s.append(seconds)
            print(f"  round {number}: write {write_s[-1]:.2f} s, bare {plain:.2f} s", flush=True)
    return {name: way.stalls_s for name, way in ways.items()}, list(zip(write_s[1:], plain_s, strict=True))


def main() -> int:
    """Measure, print the table, and return 1 if a goal is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="default 8, four minutes; an interval needs 2")
    asked = parser.parse_args()
    if asked.rounds < 2:
        parser.error(f"--rounds {asked.rounds}: an interval needs 2 or more")
    torch.set_num_threads(1)
    return 0 if run(Training(), asked.rounds) else 1


def run(training: Training, rounds: int) -> bool:
    """Measure with such a loop, and print; whether every goal is met."""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        dist.init_process_group("gloo", store=dist.FileStore(f"{name}/store", 1), rank=0, world_size=1)
        try:
            stalls_s, writes = measure(training, rounds, Path(name))
        finally:
            dist.destroy_process_group()
    return report(stalls_s, writes)


def report(stalls_s: dict[str, list[float]], writes: list[tuple[float, float]]) -> bool:
    """Print what was measured; whether every goal is met."""
    means = {name: mean(values) for name, values in stalls_s.items()}
    most_s = max(means["shoal"][2], 1e-4)  # below what such a loop can tell
    print("stall per checkpoint, mean [95 %] in ms, and at least how many times ours:")
    for name, (middle, low, high) in means.items():
        times = "" if name == "shoal" else f"   {max(low, 0) / most_s:.1f} x"
        print(f"  {name:45} {middle * 1e3:8.1f} [{low * 1e3:.1f}, {high * 1e3:.1f}]{times}")
    first = max(means["torch.save + fsync"][1], 0) / most_s
    best = min(max(low, 0) for name, (_, low, _) in means.items() if name != "shoal") / most_s
    rate = paired_ratio([plain for _, plain in writes], [ours for ours, _ in writes])
    print(f"bytes/s of the background write / bare loop of the same priority: {rate}")
    goals = [
        (f"at least {GOAL_SAVE:g} x less than torch.save + fsync: {first:.1f} x", first >= GOAL_SAVE),
        (f"at least {GOAL_BEST:g} x less than the best peer: {best:.1f} x", best >= GOAL_BEST),
        (f"bytes/s at least {GOAL_DISK} of the ceiling: {rate.low:.2f}", rate.low >= GOAL_DISK),
    ]
    for text, is_met in goals:
        print(f"goal, lower bound {text}: {'met' if is_met else 'NOT MET'}")
    return all(is_met for _, is_met in goals)


if __name__ == "__main__":
    sys.exit(main())
