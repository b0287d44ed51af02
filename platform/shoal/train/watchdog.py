"""Which worker of a group hangs, from what all of them say. Decides only: no clock, no processes, no Ray.

A group of workers moves together, so when one stops, all stop. The one to blame is the one that does not wait for the
others. What looks like a hang may be a loop that pauses on purpose, so stalls at the same step make the limits grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from shoal.train.pulse import Phase, Pulse

MIN_S = 5.0
NUM_STEPS = 10
"""A worker may be still for as many of its median steps, and for `MIN_S` at least."""

PAUSE_S: Mapping[Phase, float] = {"evaluate": 120.0, "save": 600.0}
"""How long it may be still elsewhere: one batch of an evaluation may compile, and a large model on a slow disk takes
minutes. Set-up has no limit of ours (data is fetched, models compile); collectives have their deadline there."""

SILENCE_IN_SET_UP_S = 60.0
"""How long a worker may not answer while it is set up: imports and compilers hold the interpreter's lock."""

GROWTH = 4.0
"""How much longer every limit of a kind is after a stall of that kind without a step since the one before. It never
shrinks: a pause that a loop makes on purpose costs three or four restarts of a whole run; what hangs now and then,
and goes on after a restart, is noticed as soon the next time."""

_MAX_GAP_S = 1.0
"""Looks that are further apart count as this: a controller that was itself stopped has not seen silence."""


class Why(StrEnum):
    """How it is known that a worker hangs."""

    SILENT = "did not answer"
    """The whole process stands: stopped, or something holds the interpreter's lock."""
    STILL = "did not move"
    """It answers, but its training thread is where it was, and not in a collective."""
    APART = "waited for each other"
    """All wait in collectives, which therefore are not the same one."""


@dataclass(frozen=True)
class Stall:
    """A verdict. Of workers that wait for each other each is named, and replacing the last one frees them all."""

    ranks: tuple[int, ...]
    why: Why
    seconds: float
    phase: Phase
    steps: int
    """Steps done. Of a silent rank its peers know better: its own count is that of when it last answered."""
    pulses: Mapping[int, Pulse]
    """The last that each of ``ranks`` said; none of one that never answered."""

    @property
    def victim(self) -> int:
        """The rank to replace. Not rank 0 where there is a choice: it holds the run's lock."""
        return self.ranks[-1]


class Watchdog:
    """Judges the groups of one run, one after the other, and remembers over all of them."""

    def __init__(self) -> None:
        self._growth = {Why.SILENT: 1.0, Why.STILL: 1.0}
        self._stalled_at: dict[object, int] = {}
        self.begin_group()

    def begin_group(self, replaced: Iterable[int] | None = None) -> None:
        """Other processes than before are watched from now on: all, or those that ``replaced`` others."""
        if replaced is None:
            self._pulses: dict[int, Pulse] = {}
            self._silent_s: dict[int, float] = {}
            self._seen_at: float | None = None
            self._told: set[int] = set()
            """Whom a verdict was about already: it is being carried out."""
        for rank in replaced or ():
            self._pulses.pop(rank, None)
            self._silent_s.pop(rank, None)
            self._told.discard(rank)
        self._answering: dict[int, Pulse] = {}

    def look(self, answers: Mapping[int, Pulse | None], now: float) -> None:
        """Take in what each rank that lives says; None of one whose answer has not come yet.

        ``now`` is in seconds, on any clock that never goes back.
        """
        gap_s = 0.0 if self._seen_at is None else min(now - self._seen_at, _MAX_GAP_S)
        self._seen_at = now
        for rank, pulse in answers.items():
            self._silent_s[rank] = self._silent_s.get(rank, 0.0) + gap_s if pulse is None else 0.0
            if pulse is not None:
                self._pulses[rank] = pulse
        for rank in self._silent_s.keys() - answers.keys():
            del self._silent_s[rank]
        self._answering = {
            rank: pulse for rank, pulse in answers.items() if pulse is not None and pulse.phase != "done"
        }

    @property
    def steps_done(self) -> int:
        """The most steps that any of the workers has said to have done."""
        return max((pulse.steps for pulse in self._pulses.values()), default=0)

    def judge(self) -> Stall | None:
        """Who hangs by what was seen so far, if anybody. A verdict can make limits grow, so act on it, or say it."""
        stall = self._silent() or self._still() or self._apart()
        if stall is not None:
            is_silent = stall.why is Why.SILENT
            # Several processes may stop at once; that a loop pauses concerns them all.
            whose = stall.victim if is_silent else Why.STILL
            if stall.steps <= self._stalled_at.get(whose, -1):
                self._growth[Why.SILENT if is_silent else Why.STILL] *= GROWTH
            self._stalled_at[whose] = stall.steps
            self._told.add(stall.victim)
        return stall

    def is_hopeless(self, rank: int) -> bool:
        """Whether a worker whose group ends will not come to its own end: the short limits hold, saving has none."""
        pulse = self._pulses.get(rank)
        if pulse is None or pulse.phase in ("set up", "save", "done"):
            return False
        return pulse.age_s + self._silent_s.get(rank, 0.0) > _step_limit_s(pulse)

    def _silent(self) -> Stall | None:
        for rank, seconds in sorted(self._silent_s.items()):
            # A group sets up together: what a peer says beyond it holds for one that was last heard in it, too.
            known = [self._pulses.get(rank), *self._pulses.values()]
            pulse = next(
                (pulse for pulse in known if pulse is not None and pulse.phase not in ("set up", "done")),
                None,
            )
            limit_s = _step_limit_s(pulse) if pulse is not None else SILENCE_IN_SET_UP_S
            if seconds > limit_s * self._growth[Why.SILENT] and rank not in self._told:
                phase = pulse.phase if pulse is not None else "set up"
                return Stall((rank,), Why.SILENT, seconds, phase, self.steps_done, self._said_by([rank]))
        return None

    def _still(self) -> Stall | None:
        pulses = self._answering
        is_waited_for = any(pulse.is_waiting for pulse in pulses.values())
        late = {
            rank: pulse.age_s / limit_s
            for rank, pulse in pulses.items()
            if rank not in self._told
            and not pulse.is_waiting
            and (limit_s := self._limit_s(pulse, is_waited_for)) is not None
        }
        worst = max(late, key=lambda rank: late[rank], default=None)
        if worst is None or late[worst] <= 1:
            return None
        pulse = pulses[worst]
        return Stall((worst,), Why.STILL, pulse.age_s, pulse.phase, pulse.steps, self._said_by([worst]))

    def _apart(self) -> Stall | None:
        pulses = self._answering
        if (
            not pulses
            or self._told
            or any(self._silent_s.values())
            or not all(p.is_waiting for p in pulses.values())
        ):
            return None
        limits = [self._limit_s(pulse, False) for pulse in pulses.values()]
        age_s = min(pulse.age_s for pulse in pulses.values())
        if any(limit_s is None or age_s <= limit_s for limit_s in limits):
            return None
        ranks = sorted(pulses)
        pulse = pulses[ranks[-1]]
        return Stall(tuple(ranks), Why.APART, age_s, pulse.phase, pulse.steps, self._said_by(ranks))

    def _limit_s(self, pulse: Pulse, is_waited_for: bool) -> float | None:
        """How long this worker may be still; None for as long as it likes."""
        if pulse.phase in ("set up", "done"):
            return None
        limit_s = PAUSE_S.get(pulse.phase)
        if limit_s is None:
            # Peers that wait are evidence; where nobody waits for it, only time speaks: all may well be pausing.
            limit_s = _step_limit_s(pulse) * (1.0 if is_waited_for else GROWTH)
        return limit_s * self._growth[Why.STILL]

    def _said_by(self, ranks: list[int]) -> dict[int, Pulse]:
        return {rank: self._pulses[rank] for rank in ranks if rank in self._pulses}


def _step_limit_s(pulse: Pulse) -> float:
    return max(MIN_S, NUM_STEPS * (pulse.step_s or 0.0))
