"""Wait for an idle machine between two measurements, so that neither pays for what the other left running."""

from __future__ import annotations

import time

IDLE_PERCENT = 20
DEADLINE_S = 60.0


def wait_until_idle() -> None:
    """Block until all cores together were less than `IDLE_PERCENT` busy for a second, or say that they were not."""
    import psutil

    deadline = time.monotonic() + DEADLINE_S
    while (busy := psutil.cpu_percent(interval=1.0)) > IDLE_PERCENT:
        if time.monotonic() > deadline:
            print(f"  the machine is not idle after {DEADLINE_S:g} s ({busy:.0f} % busy)", flush=True)
            return
