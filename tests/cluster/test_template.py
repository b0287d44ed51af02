"""A real template: its copies are what the interpreter would be, it outlives bad requests, and not its raylet."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import shoal
from projects import outside_environment
from shoal.cluster import processes, worker_launch
from shoal.cluster.info import run_dir_of, runtime_root
from shoal.cluster.template import bind
from waiting import DEADLINE_S, wait_until

pytestmark = pytest.mark.slow

RAYLET, JOB = "RAY_RAYLET_PID", "RAY_JOB_ID"
LIBRARY = str(Path(shoal.__file__).parents[1])
UNUSED = "tabnanny"
"""A module of the standard library that neither torch nor Ray imports."""
_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2): orphans below this process become its children."""


class Served:
    """A template with a raylet of its own, which is any process; `close` ends both and says what was left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster_id = os.urandom(8).hex()
        self.run_dir = run_dir_of(self.cluster_id)
        runtime_root().mkdir(mode=0o700, exist_ok=True)
        self.run_dir.mkdir(mode=0o700)
        self.path = self.run_dir / "template"
        self.environment = outside_environment(
            SPT_NOENV="1", SHOAL_CLUSTER_ID=self.cluster_id, OMP_NUM_THREADS="2", PYTHONPATH=LIBRARY
        )
        self.raylet = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        with bind(str(self.path)) as listener, (self.run_dir / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shoal.cluster.template", str(listener.fileno())],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
            )

    @property
    def log(self) -> str:
        return (self.run_dir / "log").read_text()[-2000:]

    def script(self, body: str) -> Path:
        """A worker's script with that body."""
        folder = self.folder / f"script-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        (folder / "default_worker.py").write_text(f"import json, os, sys\n{body}\n")
        return folder / "default_worker.py"

    def launch(self, body: str, *arguments: str, **differing: Any) -> subprocess.Popen[str]:
        """A worker with that script, its streams piped, as the raylet starts one; variables may differ."""
        prefix = differing.pop("prefix", [])
        options = {name: differing.pop(name) for name in ("cwd",) if name in differing}
        launcher = [sys.executable, "-I", "-S", worker_launch.__file__, sys.executable, str(self.path)]
        return subprocess.Popen(
            [*prefix, *launcher, str(self.script(body)), *arguments],
            env={**self.environment, RAYLET: str(self.raylet.pid), JOB: "01000000", **differing},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, body: str, *arguments: str, **differing: Any) -> tuple[str, str]:
        """What such a worker writes to its two streams until it has ended."""
        with self.launch(body, *arguments, **differing) as worker:
            try:
                return worker.communicate("in\n", timeout=DEADLINE_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                raise AssertionError(f"a worker did not end; the template: {self.log}") from None

    def ask(self, expression: str, *arguments: str, **differing: Any) -> Any:
        """The value of an expression in a copy, by way of JSON."""
        return self.ask_with_parent(expression, *arguments, **differing)[0]

    def ask_with_parent(self, expression: str, *arguments: str, **differing: Any) -> tuple[Any, int]:
        """The value of an expression in a worker, and the worker's parent."""
        out, err = self.run(f"print(json.dumps([{expression}, os.getppid()]))", *arguments, **differing)
        assert out, f"{err}\nthe template: {self.log}"
        value, parent = json.loads(out)
        return value, parent

    def server(self) -> int:
        """The process of which workers are forked now."""
        parent = int(self.ask_with_parent("0")[1])
        assert parent != os.getpid(), f"a worker ran by itself: {self.log}"
        return parent

    def end_raylet(self) -> None:
        self.raylet.communicate()

    def close(self) -> None:
        self.end_raylet()
        left = processes.stop(self.cluster_id, grace_s=1.0, deadline_s=20.0)
        self.process.wait(DEADLINE_S)
        shutil.rmtree(self.run_dir)
        assert not left, processes.describe(left)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One template for the module; tests leave it serving, if in a successor."""
    served = Served(tmp_path_factory.mktemp("template"))
    try:
        served.server()
        yield served
    finally:
        served.close()


def test_a_copy_has_the_arguments_and_streams_of_the_worker(template: Served) -> None:
    body = "print(sys.argv[1:], input(), __name__, os.path.basename(__file__)); print('err', file=sys.stderr)"
    assert template.run(body, "a b", "", "--c=ö") == (
        "['a b', '', '--c=ö'] in __main__ default_worker.py\n",
        "err\n",
    )


def test_a_copy_has_what_the_template_imported(template: Served) -> None:
    names = ("torch", "torch._dynamo", "ray", "shoal.train.workers")
    assert template.ask(f"[n for n in {names} if n in sys.modules]") == list(names)


def test_a_copy_has_the_workers_environment_in_c_too(template: Served) -> None:
    body = (
        "import ctypes; get = ctypes.CDLL(None).getenv; get.restype = ctypes.c_char_p; "
        "names = ['RAY_JOB_ID', 'RAY_RAYLET_PID', 'PWD', 'OLDPWD']; "
        "print(json.dumps([dict(os.environ), [(get(n.encode()) or b'').decode() for n in names]]))"
    )
    out, err = template.run(body, RAY_JOB_ID="02000000", PWD="/p")
    assert out, err
    python, c = json.loads(out)
    raylet = str(template.raylet.pid)
    assert c == ["02000000", raylet, "/p", template.environment.get("OLDPWD", "")]
    wanted = {**template.environment, RAYLET: raylet, JOB: "02000000", "PWD": "/p"}
    assert {name: python.get(name) for name in wanted} == wanted


def test_a_worker_of_no_job_in_particular_has_no_job(template: Served) -> None:
    environment = {**template.environment, RAYLET: str(template.raylet.pid)}
    script = template.script("print(os.environ.get('RAY_JOB_ID'), os.getppid())")
    launcher = [sys.executable, "-I", "-S", worker_launch.__file__, sys.executable, str(template.path)]
    done = subprocess.run([*launcher, str(script)], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["None", str(template.server())], done.stderr


def test_a_copy_begins_in_the_workers_folder(template: Served, tmp_path: Path) -> None:
    assert template.ask("os.getcwd()", cwd=tmp_path) == str(tmp_path)


def test_a_copy_searches_modules_where_the_interpreter_would(template: Served, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("WHERE = __file__")
    path = os.pathsep.join((str(tmp_path), "relative", LIBRARY, str(tmp_path / "later")))
    body = "import mine; print(json.dumps([sys.path, mine.WHERE, os.getppid()]))"
    script = template.script(body)
    plain = subprocess.run(
        [sys.executable, str(script)],
        env={**template.environment, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    own, _, _ = json.loads(plain.stdout)
    out, err = template.run(body, PYTHONPATH=path, cwd=tmp_path)
    assert out, err
    found, where, parent = json.loads(out)
    assert parent == template.server()
    assert where == str(tmp_path / "mine.py")
    assert os.path.basename(os.path.dirname(found[0])) == template.folder.name
    assert [entry for entry in found[1:] if entry in own] == own[1:]


def test_a_copy_has_the_workers_niceness_and_limit_and_a_session_of_its_own(template: Served) -> None:
    prefix = ["nice", "-n", "3", "sh", "-c", 'ulimit -Sn 300; exec "$@"', "sh"]
    expression = (
        "[os.getpriority(os.PRIO_PROCESS, 0), __import__('resource').getrlimit(7)[0], "
        "os.getsid(0) == os.getpgrp() == os.getpid()]"
    )
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert template.ask(expression, prefix=prefix) == [min(19, mine + 3), 300, True]


def test_an_exception_is_told_on_the_workers_own_stream(template: Served) -> None:
    before = template.log
    out, err = template.run("raise RuntimeError('mine')")
    assert out == ""
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("RuntimeError: mine\n")
    assert template.run("sys.exit('my last words')")[1] == "my last words\n"
    assert template.log == before


def test_copies_draw_different_random_numbers(template: Served) -> None:
    body = (
        "import random, uuid, numpy as np, multiprocessing as m; from ray import ObjectID; "
        "print(json.dumps([random.random(), np.random.random(), np.random.default_rng().random(), uuid.uuid4().hex, "
        "ObjectID.from_random().hex(), m.current_process().authkey.hex()]))"
    )
    first, second = (json.loads(template.run(body)[0]) for _ in range(2))
    assert [mine for mine, other in zip(first, second, strict=True) if mine == other] == []


def test_torch_computes_in_a_copy_with_threads(template: Served) -> None:
    body = (
        "import torch; torch.set_num_threads(2); x = torch.ones(512, 512, requires_grad=True); "
        "y = (x @ x).sum(); y.backward(); print(y.item(), x.grad.sum().item(), torch.get_num_threads())"
    )
    value, gradient, threads = template.run(body)[0].split()
    assert (float(value), float(gradient), threads) == (float(512**3), 2.0 * 512**3, "2")


def test_a_copy_can_wait_for_its_own_children(template: Served) -> None:
    assert template.ask("__import__('signal').getsignal(17)") == signal.SIG_DFL
    code = "__import__('subprocess').run([sys.executable, '-S', '-c', 'raise SystemExit(7)']).returncode"
    assert template.ask(code) == 7


def test_a_copy_keeps_nothing_of_the_templates_open(template: Served) -> None:
    body = (
        "found = {n: os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') "
        "if os.path.exists(f'/proc/self/fd/{n}') or os.path.islink(f'/proc/self/fd/{n}')}; "
        "print(json.dumps([t for n, t in found.items() if int(n) > 2]))"
    )
    opened = json.loads(template.run(body)[0])
    assert [what for what in opened if what.startswith("socket:") or "log" in what] == []


@pytest.mark.parametrize(
    "differing", [{"OMP_NUM_THREADS": "1"}, {"LD_PRELOAD": ""}, {"PYTHONHASHSEED": "0"}, {RAYLET: "1"}]
)
def test_a_worker_whose_libraries_may_load_otherwise_runs_by_itself(
    template: Served, differing: dict[str, str]
) -> None:
    ((name, value),) = differing.items()
    found, parent = template.ask_with_parent(f"[os.environ[{name!r}], 'torch' in sys.modules]", **differing)
    assert (found, parent) == ([value, False], os.getpid())
    assert f"a worker starts by itself: {name} differ" in template.log


def open_files(pid: int) -> set[str]:
    return set(os.listdir(f"/proc/{pid}/fd"))


def wait_no_more_open(pid: int, before: set[str]) -> None:
    """What it had open before may be gone: the connection that it had just answered."""
    wait_until(lambda: open_files(pid) <= before, lambda: f"{open_files(pid)} are open, {before} were")


def test_nothing_remains_of_a_copy_that_ended(template: Served) -> None:
    server = psutil.Process(template.server())
    before = open_files(server.pid)
    for _ in range(3):
        template.run("pass")
        template.run("pass", OMP_NUM_THREADS="7")
    wait_until(lambda: not server.children(), lambda: f"zombies or copies: {server.children()}")
    wait_no_more_open(server.pid, before)
    assert server.children() == []
    assert open_files(server.pid) <= before


UNREADABLE = (
    b"x",
    (10).to_bytes(8, "big"),
    b"\xff" * 8,
    (2).to_bytes(8, "big") + b"{}",
    (2).to_bytes(8, "big") + b"[]",
    (4).to_bytes(8, "big") + b"\xff\xff\xff\xff",
    (1 << 24).to_bytes(8, "big") + b"{",
)


def test_requests_that_cannot_be_read_end_nothing(template: Served) -> None:
    server = template.server()
    before = open_files(server)
    for sent, num_streams in itertools.product(UNREADABLE, (0, 1, 3, 4)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(DEADLINE_S)
            connection.connect(str(template.path))
            socket.send_fds(connection, [sent], [2] * num_streams)
            connection.shutdown(socket.SHUT_WR)
            try:
                assert connection.recv(1) == b"", (sent, num_streams)
            except ConnectionResetError:
                assert len(sent) > 8  # it did not read on
    assert template.server() == server
    wait_no_more_open(server, before)


def test_one_that_hangs_up_ends_nothing(template: Served) -> None:
    server = template.server()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(template.path))
    assert template.server() == server


def test_a_worker_that_no_longer_waits_is_not_forked(template: Served, tmp_path: Path) -> None:
    server = psutil.Process(template.server())
    script = template.script(f"open({str(tmp_path / 'ran')!r}, 'x')")
    environment = {**template.environment, RAYLET: str(template.raylet.pid), JOB: "01000000"}
    request = worker_launch.plan([str(script)], environment, sys.executable, str(tmp_path))
    assert request is not None
    server.suspend()
    try:
        assert not worker_launch.ask(request, str(template.path), 0.1)
    finally:
        server.resume()
    assert template.server() == server.pid
    wait_until(lambda: not server.children(), lambda: f"copies: {server.children()}")
    assert not (tmp_path / "ran").exists()


def test_a_successor_that_imported_more_takes_over(template: Served) -> None:
    before = template.process.pid
    has_module = f"{UNUSED!r} in sys.modules"
    assert template.ask_with_parent(has_module) == (False, before)
    (template.run_dir / "imports.json").write_text(json.dumps([UNUSED, "no.such.module"]))

    # Asking would put it off: it begins when nobody has asked for a moment.
    wait_until(lambda: template.process.poll() is not None, lambda: f"still the first: {template.log}")
    assert template.process.returncode == 0, template.log
    found, parent = template.ask_with_parent(has_module)
    assert found is True
    assert parent not in (before, os.getpid()), template.log
    assert template.ask("__import__('threading').active_count()") == 1


@pytest.fixture
def adopting() -> Iterator[None]:
    """Orphans of this process's children become its own, so that it learns how they ended."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    assert prctl(_SUBREAPER, 0, 0, 0, 0) == 0


def test_it_ends_with_its_raylet_and_copies_end_as_they_would(tmp_path: Path, adopting: None) -> None:
    endings = {"sys.exit(3)": 3, "raise ValueError": 1, "pass": 0, "sys.exit('x')": 1}
    served = Served(tmp_path)
    workers = {}
    try:
        for ending in endings:
            worker = served.launch(f"print(os.getpid(), flush=True); input(); {ending}")
            assert worker.stdout is not None
            workers[ending] = worker, int(worker.stdout.readline())
            assert worker.wait(DEADLINE_S) == 0, "the launcher ends as soon as a copy runs"
        served.end_raylet()
        took_s = wait_until(lambda: served.process.poll() is not None, lambda: served.log)
        assert served.process.returncode == 0
        assert took_s < 30
        found = {}
        for ending, (worker, pid) in workers.items():
            worker.communicate("on\n", timeout=DEADLINE_S)
            found[ending] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert found == endings
    finally:
        for worker, _ in workers.values():
            with worker:
                worker.kill()
        served.close()
