"""Train runs one after the other, alone or under torchrun: ``trainee.py STORAGE STEPS NAME...``, a test's subprocess.

``SHOAL_TEST_SHARDS=n`` makes them exact, of n shards. ``SHOAL_TEST_KILL=rank:step`` kills that rank with SIGKILL in
the middle of that step of the last one. ``SHOAL_TEST_NO_CHECKPOINTS=1`` leaves it to survivors to commit.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import shoal
from shoal.storage import Storage
from shoal.train.engine import train_worker
from shoal.train.group import torchrun_group
from shoal.train.spec import RunSpec
from toy import Toy
from waiting import wait_until

BATCH_SIZE = 20
"""Not a multiple of the number of shards, and each has two samples at least: BatchNorm needs them."""


class KilledToy(Toy):
    """Toy, one of whose workers dies."""

    def checkpoints(self) -> Path:
        return Storage(Path(sys.argv[1])).run_dir(sys.argv[-1]) / "checkpoints"

    def train(self, session: shoal.Session) -> None:
        rank, step = map(int, os.environ["SHOAL_TEST_KILL"].split(":"))
        for batch in session.batches():
            loss = session.loss(batch)
            if (session.group.rank, session.steps_done) == (rank, step):
                if not os.environ.get("SHOAL_TEST_NO_CHECKPOINTS"):
                    wait_until(
                        lambda: any(self.checkpoints().glob("step-*")), "a slow disk has a first checkpoint"
                    )
                os.kill(os.getpid(), signal.SIGKILL)
            session.backward(loss)
            session.step()


def main() -> None:
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # torchrun ends the peers of a dead rank; here they end themselves
    storage, steps, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    with torchrun_group() as group:
        for name in names:
            is_victim = bool(os.environ.get("SHOAL_TEST_KILL")) and name == names[-1]
            spec = RunSpec(
                recipe=KilledToy(batch_size=BATCH_SIZE) if is_victim else Toy(batch_size=BATCH_SIZE),
                name=name,
                storage=Storage(storage),
                target_steps=steps,
                checkpoint_every_s=1e6 if os.environ.get("SHOAL_TEST_NO_CHECKPOINTS") else 0.05,
                threads=1,
                shards=int(shards) if (shards := os.environ.get("SHOAL_TEST_SHARDS")) else None,
            )
            train_worker(spec, group)
    left = [
        name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())
    ]
    assert not left, f"the process group was left and lives on: {left}"


if __name__ == "__main__":
    main()
