"""What tests of training share: a process from which groups of workers are forked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fleet import Fleet


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()
