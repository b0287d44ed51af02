"""A recipe some of whose workers hang once, for `test_hangs`: workers import it from the project's folder."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import shoal
from toy import Toy

HANGS_AT = 30


class Hanging(Toy):
    """Toy; the workers of ``ranks`` hang in a step, in the first attempt only."""

    steps = 200

    how: str = "stop"
    ranks: str = "1"
    marks: str = ""
    """Folder for two files, ``hung`` and ``went-on``, with the times of the hang and of the next attempt's first
    step."""

    def train(self, session: shoal.Session) -> None:
        marks = Path(self.marks)
        is_first = not (marks / "hung").exists()
        is_chosen = is_first and str(session.group.rank) in self.ranks
        for batch in session.batches():
            session.backward(session.loss(batch))
            if is_chosen and session.steps_done == HANGS_AT:
                (marks / "hung").write_text(str(time.time()))
                getattr(self, self.how)(session)
            session.step()
            if not is_first and session.group.is_first and not (marks / "went-on").exists():
                (marks / "went-on").write_text(str(time.time()))

    def stop(self, session: shoal.Session) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def deadlock(self, session: shoal.Session) -> None:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()  # the line that the stack shows

    def hold(self, session: shoal.Session) -> None:
        """Keep the interpreter's lock: the process lives, and answers nobody."""
        import ctypes

        ctypes.PyDLL(None).pause()

    def apart(self, session: shoal.Session) -> None:
        """A collective that the others do not take part in."""
        session.group.share(None)
