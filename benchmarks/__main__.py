"""Every benchmark, one after the other: ``make bench``."""

from __future__ import annotations

import subprocess
import sys

SCRIPTS = ("startup", "train", "submit", "trials", "serve")


def main() -> int:
    """Run them all; the exit status says whether every goal was met."""
    failed = [
        name
        for name in SCRIPTS
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
    ]
    print(f"goals not met: {', '.join(failed)}" if failed else "every goal was met")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
