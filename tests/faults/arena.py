"""Plays scenarios with real processes: ``python -m faults.arena`` reads one JSON line each.

It plays them all at once, and prints the folder of each that is over.

In the place of the cluster: it starts workers, sees them die, puts others in their places and calls the next
generation, as `shoal.train.ray_edge` does. Workers are forked from this process, which has imported torch and done
nothing with it, so that one starts in milliseconds.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what the first optimizer step loads: once here, not in every worker

from faults import inject
from faults.plan import Attempt, Scenario
from faults.workload import STEPS, Traced, tell_through, work
from shoal.errors import PeerLost
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from shoal.train.rendezvous import Place, Rendezvous, Seat, places, run_in_generations, take_seat
from shoal.train.spec import RunSpec

RUN = "run"
DEADLINE_S = 90.0
"""Of a whole scenario, which takes a second or two."""
COLLECTIVE_TIMEOUT_S = 40.0
_LOST, _BROKEN = 3, 4
_PR_SET_PDEATHSIG = 1


@dataclass
class _Worker:
    pid: int
    rank: int
    ended: int
    """A descriptor that is readable once the process has ended."""
    armed: int | None = None
    """Which attempt's faults it carries; None before it said so."""


class _Meeting:
    """A `Rendezvous` in a process of its own: it has threads, and workers are forked from this process.

    A fork copies the locks that other threads hold: a worker once stood for ever in its first call of torch.
    """

    def __init__(self) -> None:
        self._mine, its = Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._serve(its)
        its.close()

    def seat(self, place: Place) -> Seat:
        self._mine.send(place)
        seat: Seat = self._mine.recv()
        return seat

    def call(self) -> None:
        self._mine.send("call")
        self._mine.recv()

    def dismiss(self) -> None:
        """Send home whoever waits for a call, now or later."""
        self._mine.send("dismiss")
        self._mine.recv()

    def close(self) -> None:
        """End the process; whoever waits is sent home."""
        self._mine.send(None)  # an end of file would not come: workers hold copies of the pipe
        self._mine.close()
        os.waitpid(self._pid, 0)

    def _serve(self, channel: Connection) -> None:
        """In the child; does not return."""
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            self._mine.close()
            meeting = Rendezvous("127.0.0.1")
            while asked := channel.recv():
                if asked == "call":
                    meeting.call()
                    channel.send(None)
                elif asked == "dismiss":
                    meeting.close()
                    channel.send(None)
                else:
                    channel.send(meeting.seat(asked, backend="gloo", timeout_s=COLLECTIVE_TIMEOUT_S))
            meeting.close()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)


class _Broken(Exception):
    """The scenario cannot go on."""


@dataclass
class _Play:
    """One scenario while it is played."""

    scenario: Scenario
    folder: Path
    attempts: int = 0
    fired: list[tuple[int, int]] = field(default_factory=list)
    """(attempt of the plan, rank) of the faults that killed."""
    ends: list[str] = field(default_factory=list)
    workers: dict[int, _Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + DEADLINE_S
        self.hear, self.tell = os.pipe()
        os.set_blocking(self.hear, False)
        self.rest = b""
        self.next_fault = 0
        storage = Storage(self.folder / "storage")
        self.record = RunRecord(storage, RUN)
        self.spec = RunSpec(
            recipe=Traced(),
            name=RUN,
            storage=storage,
            target_steps=STEPS,
            seed=5,
            shards=self.scenario.shards,
            checkpoint_every_s=self.scenario.checkpoint_every_s,
            checkpoint_at_eval=True,
            keep=2,
            threads=1,
        )

    def run(self) -> None:
        """Until the run has finished.

        Raises:
            _Broken: it takes too long, a worker raised, or it was started again without a reason.
        """
        self.spec.storage.check()
        self.record.claim_identity(self.spec.identity())
        size = self.scenario.workers
        try:
            while (state := self.record.state()) != RunState.FINISHED:
                if state == RunState.FAILED:
                    raise _Broken(f"the run failed: {self.record.events(('end',))[-1]['error']}")
                size = self._one_group(size)
        finally:
            for worker in list(self.workers.values()):
                os.kill(worker.pid, signal.SIGKILL)
                self._reap(worker)
            self._listen()
            os.close(self.hear)
            os.close(self.tell)

    def _one_group(self, size: int) -> int:
        """Play until none of its workers is left; how many the next group has."""
        meeting = _Meeting()
        try:
            return self._play_group(meeting, size)
        finally:
            meeting.close()

    def _play_group(self, meeting: _Meeting, size: int) -> int:
        seats = places(["here"] * size)
        for place in seats:
            self._start(meeting, place)
        self._call(meeting)
        has_finished = False
        while self.workers:
            dead = []
            for worker in self._wait_for_ends():
                status = self._reap(worker)
                if status == 0:
                    has_finished = True
                elif status == _BROKEN:
                    raise _Broken(f"rank {worker.rank} raised; see {self.folder / 'output'}")
                else:
                    dead.append(worker)
            plan = self._plan()
            if plan is not None and any(index == self.next_fault for index, _ in self.fired):
                self.next_fault += 1
                if plan.then is not None:
                    self._kill_all()
                    return plan.then
            if (
                has_finished
            ):  # those who are done meet nobody again, also not who was started for a dead one meanwhile
                meeting.dismiss()
            elif dead and self.workers:
                for worker in dead:
                    self._start(meeting, seats[worker.rank])
                self._call(meeting)
        return size

    def _plan(self) -> Attempt | None:
        planned = self.scenario.attempts
        return planned[self.next_fault] if self.next_fault < len(planned) else None

    def _call(self, meeting: _Meeting) -> None:
        self.attempts += 1
        if self.attempts > 3 * len(self.scenario.attempts) + 3:
            raise _Broken(f"attempt {self.attempts}, and only {len(self.scenario.attempts)} were disturbed")
        plan = self._plan()
        armed = {
            "attempt": self.attempts,
            "index": self.next_fault,
            "faults": [vars(fault) for fault in plan.faults] if plan else [],
        }
        path = self.folder / "armed.json"
        path.with_suffix(".part").write_text(json.dumps(armed))
        path.with_suffix(".part").rename(path)
        meeting.call()

    def _start(self, meeting: _Meeting, place: Place) -> None:
        seat = meeting.seat(place)
        pid = os.fork()
        if pid == 0:
            self._be_worker(seat)
        self.workers[pid] = _Worker(pid, place.rank, os.pidfd_open(pid))

    def _be_worker(self, seat: Seat) -> None:
        """In the child; does not return."""
        status = _BROKEN
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            output = os.open(self.folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            faulthandler.register(signal.SIGUSR1)
            tell_through(self.tell)
            inject.watch(self.spec.storage.root)
            take_seat(seat)
            run_in_generations(work, {"spec": self.spec, "armed": str(self.folder / "armed.json")})
            status = 0
        except PeerLost:
            traceback.print_exc()
            status = _LOST
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _wait_for_ends(self) -> list[_Worker]:
        while True:
            by_descriptor = {worker.ended: worker for worker in self.workers.values()}
            left_s = self.deadline - time.monotonic()
            if left_s <= 0:
                self._give_up()
            ready, _, _ = select.select([self.hear, *by_descriptor], [], [], left_s)
            self._listen()
            if ended := [by_descriptor[descriptor] for descriptor in ready if descriptor != self.hear]:
                return ended

    def _listen(self) -> None:
        """Write down what workers said, and note what they carry."""
        try:
            while data := os.read(self.hear, 1 << 16):
                self.rest += data
        except BlockingIOError:
            pass  # all that was said is read
        *lines, self.rest = self.rest.split(b"\n")
        with open(self.folder / "seen.jsonl", "ab") as file:
            for line in lines:
                file.write(line + b"\n")
                said = json.loads(line)
                if "armed" in said:
                    for worker in self.workers.values():
                        if worker.rank == said["rank"]:
                            worker.armed = said["armed"]

    def _reap(self, worker: _Worker) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        os.close(worker.ended)
        del self.workers[worker.pid]
        self.ends.append(f"rank {worker.rank} in attempt {self.attempts}: {status}")
        plan = self._plan()
        is_due = plan is not None and worker.armed == self.next_fault
        if (
            plan is not None
            and is_due
            and any(fault.rank == worker.rank for fault in plan.faults)
            and status < 0
        ):
            self.fired.append((self.next_fault, worker.rank))
        return status

    def _kill_all(self) -> None:
        for worker in list(self.workers.values()):
            os.kill(worker.pid, signal.SIGKILL)
            self._reap(worker)

    def _give_up(self) -> None:
        for worker in self.workers.values():
            os.kill(worker.pid, signal.SIGUSR1)  # they write down where they are
        select.select([], [], [], 0.5)
        raise _Broken(
            f"not over after {DEADLINE_S:g} s: attempt {self.attempts}, alive: "
            f"ranks {sorted(worker.rank for worker in self.workers.values())}; see {self.folder / 'output'}"
        )


def play(scenario: Scenario, folder: Path) -> None:
    """Play it in ``folder``, and write down there how it went: ``played.json``, ``seen.jsonl``, ``output``."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    this, problem = _Play(scenario, folder), ""
    try:
        this.run()
    except _Broken as error:
        problem = str(error)
    except Exception:
        problem = f"the arena failed: {traceback.format_exc()}"
    played: dict[str, Any] = {
        "scenario": scenario.as_dict(),
        "problem": problem,
        "group": os.getpgrp(),
        "attempts": this.attempts,
        "fired": this.fired,
        "ends": this.ends,
        "seconds": time.monotonic() - began,
    }
    (folder / "played.json").write_text(json.dumps(played))


def stage(scenario: Scenario, folder: Path) -> None:
    """Play it in a process of its own, whose process group is that of its workers; returns at once."""
    if os.fork():
        return
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        play(scenario, folder)
        os.write(
            1, f"{folder}\n".encode()
        )  # in one piece, whatever PYTHONUNBUFFERED says: all stages share the pipe
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the stages
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        stage(Scenario.from_dict(asked["scenario"]), Path(asked["folder"]))


if __name__ == "__main__":
    main()
