"""``ray start``, with workers that are forked from a template: ``python -m shoal.cluster.ray_start LAUNCHER ...``.

Ray starts its processes with ``sys.executable``, which is the seam: the launcher (``worker_launch.py``) passes on
what is not a worker. The template starts here, so that its imports overlap with those of Ray's own processes.
"""

from __future__ import annotations

import subprocess
import sys


def main(launcher: str, socket_path: str, log_path: str, *arguments: str) -> None:
    """Start the template, then run ``ray`` with ``arguments``."""
    from shoal.cluster.template import bind

    with bind(socket_path) as listener, open(log_path, "ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "shoal.cluster.template", str(listener.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
        )
    from ray.scripts.scripts import main as ray

    sys.executable = launcher
    sys.argv = ["ray", *arguments]
    ray()


if __name__ == "__main__":
    main(*sys.argv[1:])
