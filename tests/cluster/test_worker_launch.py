"""What the launcher hands to the template, and what it leaves as it is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster import worker_launch

PYTHON = "/usr/bin/python3"
SETUP, WORKER = "/ray/setup_worker.py", "/ray/default_worker.py"


def plan(*argv: str, environment: dict[str, str] | None = None) -> dict[str, Any] | None:
    return worker_launch.plan(list(argv), environment or {}, PYTHON, "/somewhere")


def with_context(**context: object) -> dict[str, Any] | None:
    flag = f"--serialized-runtime-env-context={json.dumps(context)}"
    return plan(SETUP, WORKER, "--node-id=1", "--language=PYTHON", flag, environment={"A": "1", "B": "2"})


def test_a_worker_is_asked_for_without_what_only_its_setup_knows() -> None:
    bare = plan(WORKER, "--node-id=1", environment={"A": "1"})
    assert bare is not None
    assert (bare["argv"], bare["environment"], bare["cwd"]) == (
        [WORKER, "--node-id=1"],
        {"A": "1"},
        "/somewhere",
    )
    dressed = with_context()
    assert dressed is not None
    assert dressed["argv"] == bare["argv"]


@pytest.mark.parametrize(
    "argv", [[], ["-u", "/ray/log_monitor.py"], [SETUP, "-m", "ray.util.client.server"], ["-c", WORKER]]
)
def test_other_programs_are_none_of_its_business(argv: list[str]) -> None:
    assert plan(*argv) is None


def test_a_job_has_its_folder_and_variables(tmp_path: Path) -> None:
    asked = with_context(
        command_prefix=["cd", str(tmp_path), "&&"], env_vars={"B": "3"}, py_executable=PYTHON
    )
    assert asked is not None
    folders = {"PWD": str(tmp_path), "OLDPWD": "/somewhere"}  # as `cd` in a shell would
    assert (asked["cwd"], asked["environment"]) == (str(tmp_path), {"A": "1", "B": "3", **folders})


@pytest.mark.parametrize(
    "context",
    [
        {"command_prefix": ["source", "env/bin/activate", "&&"]},
        {"command_prefix": ["cd", "/no/such/folder", "&&"]},
        {"py_executable": "/other/python"},
        {"override_worker_entrypoint": "/mine.py"},
        {"java_jars": ["a.jar"]},
        {"env_vars": {"PATH": "/mine:${PATH}"}},
    ],
)
def test_what_a_copy_cannot_stand_in_for_is_left_to_ray(context: dict[str, object]) -> None:
    assert with_context(**context) is None


@pytest.fixture
def answering(tmp_path: Path) -> Any:
    """A socket at which one asker gets the given answer; what it asked for."""

    def answer(reply: bytes) -> tuple[str, list[Any]]:
        path, seen = str(tmp_path / "s"), []
        listener = socket.create_server(path, family=socket.AF_UNIX)

        def serve() -> None:
            with listener, listener.accept()[0] as connection:
                head, streams, _, _ = socket.recv_fds(connection, 8, 3)
                with connection.makefile("rb") as body:
                    seen.append(json.loads(body.read(int.from_bytes(head, "big"))))
                for stream in streams:
                    os.close(stream)
                connection.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        return path, seen

    return answer


@pytest.mark.parametrize(("reply", "is_started"), [(b"+", True), (b"", False)])
def test_it_believes_the_template_alone(answering: Any, reply: bytes, is_started: bool) -> None:
    path, seen = answering(reply)
    assert worker_launch.ask({"argv": ["x" * 300_000]}, path, 5.0) is is_started
    assert seen == [{"argv": ["x" * 300_000]}]


def test_without_a_template_it_becomes_the_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "default_worker.py"
    script.write_text("import os, sys; print(os.getpid(), sys.argv[1:], os.environ['A']); sys.exit(3)")
    launcher = [sys.executable, "-I", "-S", worker_launch.__file__, sys.executable, str(tmp_path / "gone")]
    with subprocess.Popen(
        [*launcher, str(script), "--x"], env={**os.environ, "A": "1"}, stdout=subprocess.PIPE, text=True
    ) as started:
        said, _ = started.communicate(timeout=30)
    assert (said.split(), started.returncode) == ([str(started.pid), "['--x']", "1"], 3)
