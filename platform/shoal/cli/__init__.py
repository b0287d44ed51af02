"""The same words on the shell: ``shoal --help``. Importing this loads nothing but itself."""

from __future__ import annotations


def main() -> None:
    """What the ``shoal`` command runs; ends the process."""
    from shoal.cli.app import app

    app()
