"""Run one run under torchrun, as a test's subprocess: ``trainee.py STORAGE NAME STEPS``.

``SHOAL_TEST_KILL=rank:step`` kills that rank with SIGKILL in the middle of that step.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import shoal
from shoal.storage import Storage
from shoal.train.engine import train_worker
from shoal.train.group import torchrun_group
from shoal.train.spec import RunSpec
from toy import Toy


class KilledToy(Toy):
    """Toy, one of whose workers dies."""

    def train(self, session: shoal.Session) -> None:
        rank, step = map(int, os.environ["SHOAL_TEST_KILL"].split(":"))
        for batch in session.batches():
            loss = session.loss(batch)
            if (session.group.rank, session.steps_done) == (rank, step):
                wait_for_a_checkpoint()
                os.kill(os.getpid(), signal.SIGKILL)
            session.backward(loss)
            session.step()


def wait_for_a_checkpoint(timeout_s: float = 60.0) -> None:
    """Until the one of step 20 is committed: a slow disk may still be writing it."""
    folder = Storage(Path(sys.argv[1])).run_dir(sys.argv[2]) / "checkpoints"
    deadline = time.monotonic() + timeout_s
    while not any(folder.glob("step-*")):
        assert time.monotonic() < deadline, "no checkpoint was committed"


def main() -> None:
    storage, name, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    recipe = KilledToy() if os.environ.get("SHOAL_TEST_KILL") else Toy()
    spec = RunSpec(
        recipe=recipe,
        name=name,
        storage=Storage(storage),
        target_steps=steps,
        checkpoint_every_s=0.05,
        threads=1,
    )
    with torchrun_group() as group:
        train_worker(spec, group)


if __name__ == "__main__":
    main()
