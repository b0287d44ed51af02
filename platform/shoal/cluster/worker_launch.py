"""Start a worker process for the raylet by having the template forked; runs by itself (``python -I -S``).

The raylet starts workers with the interpreter that started Ray. `shoal up` names this script as that interpreter
(``ray_start.py``). It hands the command line, the environment and the standard streams to the cluster's template
(``template.py``), a process that has imported what workers need, and ends when a copy of that runs. Whatever the
template cannot stand in for, it runs as it was asked, by becoming the real interpreter: other programs than workers,
other interpreters, environments that say how libraries load, a template that is gone.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys

_SETUP, _WORKER = "setup_worker.py", "default_worker.py"
_CONTEXT = "--serialized-runtime-env-context="
_NOT_THE_WORKERS = ("--language=", _CONTEXT)
"""Flags for `_SETUP`, which takes them away before it becomes `_WORKER`."""
_WAIT_S = 30.0
"""For a template that is still importing, which takes 4 CPU-seconds; a worker by itself would have to, too."""


def plan(argv: list[str], environment: dict[str, str], python: str, cwd: str) -> dict[str, object] | None:
    """What to ask of the template; None for a command line that it cannot stand in for."""
    if argv and argv[0].endswith(_SETUP):
        argv = argv[1:]  # the raylet leaves it out where there is no runtime environment
    if not argv or not argv[0].endswith(_WORKER):
        return None
    contexts = [part.removeprefix(_CONTEXT) for part in argv if part.startswith(_CONTEXT)]
    context = json.loads(contexts[-1]) if contexts else {}
    if context.get("override_worker_entrypoint") or context.get("java_jars"):
        return None
    if context.get("py_executable", python) != python:
        return None
    folder = _folder(context.get("command_prefix") or [], cwd)
    variables = context.get("env_vars") or {}
    if folder is None or any(
        "$" in value for value in variables.values()
    ):  # a shell would say what they mean
        return None
    return {
        "argv": [part for part in argv if not part.startswith(_NOT_THE_WORKERS)],
        "environment": environment | variables | ({"PWD": folder, "OLDPWD": cwd} if folder != cwd else {}),
        "cwd": folder,
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "oom_score_adj": _oom_score_adj(),
    }


def ask(request: dict[str, object], path: str, wait_s: float) -> bool:
    """Hand the request and this process's standard streams to the template at ``path``; whether it forked."""
    body = json.dumps(request).encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(wait_s)
            connection.connect(path)
            socket.send_fds(connection, [len(body).to_bytes(8, "big")], [0, 1, 2])
            connection.sendall(body)
            try:
                return connection.recv(1) == b"+"
            except TimeoutError:
                connection.shutdown(
                    socket.SHUT_RD
                )  # from here on a copy cannot say that it runs; it may just have
                return connection.recv(1) == b"+"
    except OSError:
        return False


def main(argv: list[str]) -> None:
    """``PYTHON SOCKET ARGUMENTS...``: have the template run the arguments, or become ``PYTHON ARGUMENTS...``."""
    python, path, *arguments = argv
    try:
        request = plan(arguments, dict(os.environ), python, os.getcwd())
    except (ValueError, TypeError, OSError):  # Ray's own launcher will say what is wrong with it
        request = None
    if request is None or not ask(request, path, _WAIT_S):
        os.execv(python, [python, *arguments])


def _oom_score_adj() -> str:
    """How soon the kernel ends this process for want of memory: the raylet has just set it, by this pid."""
    with open("/proc/self/oom_score_adj") as file:
        return file.read().strip()


def _folder(prefix: list[str], cwd: str) -> str | None:
    """Where the commands before the worker's lead; None when they do more than change the folder."""
    if not prefix:
        return cwd
    if len(prefix) == 3 and (prefix[0], prefix[2]) == ("cd", "&&") and os.path.isdir(prefix[1]):
        return prefix[1]
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
