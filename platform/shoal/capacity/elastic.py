"""How many workers a run should have while it trains, as a function of what was asked for and what is free."""

from __future__ import annotations

from shoal.config import Range

LOOKS = 3
"""At how many looks running room must be free before a run grows into it: what is free for a moment is mostly about
to be taken, by the next trial of a sweep or by workers that start again."""

MAX_LOOKS = 600
"""The most that room which turned out not to be there makes the next growth wait."""


def next_size(wish: Range, current: int, free_room: float) -> int:
    """How many workers a run of ``current`` workers should have; ``current`` where nothing is to change.

    ``free_room`` is how many more would fit beside everybody, itself included (`policy.room`). Too many become the
    wish's most; of what is free it takes all that the wish allows, unless that is still less than the wish's least.
    """
    most = int(min(current + free_room, wish.max))
    return most if most >= wish.min else current


def restart_range(wish: Range, *, before: int, planned: int) -> Range:
    """What a run that gave its room up, or lost it, takes when it comes back: ``planned`` workers at the most.

    Somebody may have been faster: with as many as it had ``before`` it goes on, be they fewer than the wish's least.
    """
    least = max(1, min(before, wish.min))
    return Range(least, max(least, min(planned, wish.max)))


class Steady:
    """Lets a larger number through only when it was the answer at `LOOKS` looks running; a smaller one at once."""

    def __init__(self) -> None:
        self._needed = LOOKS
        self._last: tuple[int, int, int] | None = None
        self._same = 0

    def settle(self, attempt: int, current: int, size: int) -> int:
        """What to act on now, of a look that found ``size`` better than ``current``."""
        found = (attempt, current, size)
        self._same = self._same + 1 if found == self._last else 1
        self._last = found
        return size if size <= current or self._same >= self._needed else current

    def judge(self, *, got_it: bool) -> None:
        """Tell how the last growth went: each that found its room taken makes the next one wait twice as long."""
        self._needed = LOOKS if got_it else min(2 * self._needed, MAX_LOOKS)
