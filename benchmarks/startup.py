"""CPU seconds of ``import shoal`` and of ``shoal --help``, as whole processes."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

CASES = {
    "import shoal": ([sys.executable, "-c", "import shoal"], 0.2),
    "shoal --help": ([sys.executable, "-m", "shoal.cli", "--help"], 0.5),
}
"""What -> (command, most CPU seconds)."""


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def main() -> int:
    """Print the medians of 10 runs; 1 if one is over its limit."""
    met = True
    for what, (command, limit_s) in CASES.items():
        cpu_seconds(command)  # the first run writes the bytecode
        median_s = statistics.median(cpu_seconds(command) for _ in range(10))
        met &= median_s < limit_s
        print(
            f"{what}: {median_s:.3f} s of CPU (goal: under {limit_s} s) {'met' if median_s < limit_s else 'NOT MET'}"
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
