"""A wish to stop something, left on storage where whoever works on it looks."""

from __future__ import annotations

from pathlib import Path

from shoal.errors import NotFoundError


class StopMark:
    """The wish to stop what lives in ``folder``, from any process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "stop"

    def set(self) -> None:
        """Ask for a stop. Does not wait for it; repeating it is safe.

        Raises:
            NotFoundError: there is no such folder.
        """
        try:
            self._path.touch()
        except FileNotFoundError:
            raise NotFoundError(f"there is no {self._folder} to stop; see `shoal runs`") from None

    def is_set(self) -> bool:
        """Whether someone asked for a stop since `clear`."""
        return self._path.exists()

    def clear(self) -> None:
        """Forget an earlier wish: for the command that starts it again, not for its retries."""
        self._path.unlink(missing_ok=True)
