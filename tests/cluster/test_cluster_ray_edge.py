"""The contract with Ray's private parts: fails, name by name, when an upgrade moves one."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.cluster import haproxy_launch, imports, ports, ray_edge, serve_guard, template, worker_launch

RUN_DIR = Path("/tmp/shoal-0/01234567")
PORTS = ports.plan(20_000, serve_port=0)
SITE = Path(str(importlib.metadata.distribution("ray").locate_file("ray")))
SERVE = ray_edge.serve_environment(PORTS, RUN_DIR, 1)
CLUSTER = ray_edge.cluster_environment(PORTS, RUN_DIR, "127.0.0.1")


def source(path: str) -> str:
    return (SITE / path).read_text()


def test_the_installed_ray_is_the_one_we_read() -> None:
    pin = re.search(r'"ray\[[^]]+\]==([\d.]+)"', (Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert pin is not None
    assert ray_edge.installed_ray_version() == ray_edge.RAY_VERSION == pin[1]


@pytest.mark.parametrize("name", sorted(SERVE))
def test_serve_reads_every_setting(name: str) -> None:
    assert f'"{name}"' in source("serve/_private/constants.py")


def test_serve_reads_the_controllers_callback() -> None:
    assert '"RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"' in source("serve/_private/constants.py")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("RAY_JOB_STOP_WAIT_TIME_S", "dashboard/modules/job/job_supervisor.py"),
        ("DASHBOARD_METRIC_PORT", "dashboard/consts.py"),
        ("AUTOSCALER_METRIC_PORT", "autoscaler/_private/constants.py"),
        ("RAY_TMPDIR", "_common/utils.py"),
        ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "_private/ray_constants.py"),
        ("RAY_USAGE_STATS_ENABLED", "_common/usage/usage_constants.py"),
        (ray_edge.CONNECT_TIMEOUT_VARIABLE, "_private/node.py"),
        ("RAY_API_SERVER_ADDRESS", "_private/ray_constants.py"),
        ("RAY_DASHBOARD_ADDRESS", "serve/scripts.py"),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "_private/runtime_env/constants.py"),
        (ray_edge.ADDRESS, "_private/ray_constants.py"),
    ],
)
def test_ray_reads_the_other_settings(name: str, path: str) -> None:
    assert f'"{name}"' in source(path)


@pytest.mark.parametrize(
    "name",
    [
        ray_edge.PRELOAD,
        ray_edge.WORKER_NICENESS,
        "RAY_prestart_worker_first_driver",
        "RAY_worker_maximum_startup_concurrency",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN_PATH",
    ],
)
def test_rays_binaries_read_the_settings_that_no_python_reads(name: str) -> None:
    assert name.removeprefix("RAY_").encode() in (SITE / "core/src/ray/raylet/raylet").read_bytes()


@pytest.mark.parametrize("name", sorted(ray_edge.RARE_LOOKS))
def test_ray_reads_how_often_it_looks(name: str) -> None:
    readers = ["_private/log_monitor.py", "dashboard/consts.py"]
    readers += [f"dashboard/modules/{module}/{module}_consts.py" for module in ("event", "reporter")]
    assert sum(f'"{name}"' in source(path) for path in readers) == 1


def test_ray_start_has_every_flag() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    command = ray_edge.start_command(PORTS, RUN_DIR, num_cpus=1, num_gpus=0)
    asked = {part.split("=")[0] for part in command if part.startswith("--")}
    assert asked <= known
    used = {int(number) for part in command for number in re.findall(r"port=(\d+)$", part)}
    fixed = {PORTS[name] for name in ray_edge.FIXED_PORTS if not re.match(r"serve|haproxy|.*_metrics$", name)}
    assert used == fixed | {0}


def test_a_port_that_ray_adds_is_noticed() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts if option.endswith("-port")}
    command = ray_edge.start_command(PORTS, RUN_DIR, num_cpus=1, num_gpus=0)
    assert known == {part.split("=")[0] for part in command if part.split("=")[0].endswith("-port")}


def test_haproxys_template_has_the_lines_that_we_mend() -> None:
    binds = [
        line.strip()
        for line in source("serve/_private/haproxy_templates.py").splitlines()
        if line.strip().startswith("bind ")
    ]
    assert binds == [
        "bind :{{ config.metrics_port }}",
        "bind {{ config.frontend_host }}:{{ config.frontend_port }}",
        "bind {{ config.grpc_frontend_host }}:{{ config.grpc_frontend_port }} proto h2",
        "bind *:{{ config.stats_port }}",
    ]
    assert "stats socket {{ config.socket_path }} mode 666 level admin" in source(
        "serve/_private/haproxy_templates.py"
    )


def test_haproxys_template_leaves_the_time_for_headers_open_and_bounds_idle_connections() -> None:
    template, haproxy = (source(f"serve/_private/{name}.py") for name in ("haproxy_templates", "haproxy"))
    assert re.findall(r"(?m)^defaults$", template) == ["defaults"]
    assert re.findall(r"(?m)^    timeout_http_request_s: .* = (\w+)$", haproxy) == ["None", "None"]
    assert "return self.http_options.keep_alive_timeout_s" in haproxy
    assert "http-buffer-request" not in template + haproxy  # with it, the time would be for bodies too


def test_the_dashboard_asks_the_gcs_for_its_status_each_time() -> None:
    text = source("dashboard/modules/reporter/reporter_head.py")
    _, _, after = text.partition(f'@routes.get("{ray_edge.STATUS_PATH}")')
    route, _, _ = after.partition("@routes.")
    assert "self.gcs_client.async_internal_kv_get(" in route


def test_haproxy_is_started_as_the_launcher_expects() -> None:
    text = source("serve/_private/haproxy.py")
    assert 'args = [haproxy_bin, "-db", "-f", self.config_file_path]' in text
    assert "return os.path.join(d, self._node_id, f)" in text


def test_the_controller_calls_back_before_it_reads_its_options() -> None:
    text = source("serve/_private/controller.py")
    callback = text.index("call_function_from_import_path(RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH)")
    assert callback < text.index("http_options=configure_http_options_with_defaults(http_options)")
    assert text.count("configure_http_options_with_defaults(") == 1


def test_replicas_bind_through_the_function_that_we_replace() -> None:
    text = source("serve/_private/replica.py")
    assert "from ray._common.tls_utils import add_port_to_grpc_server" in text
    assert f'add_port_to_grpc_server(self._server, "{serve_guard._ALL_INTERFACES}0")' in text


def test_every_worker_imports_the_guard() -> None:
    assert "if mode == ray.WORKER_MODE and args.worker_preload_modules" in source(
        "_private/workers/default_worker.py"
    )
    assert CLUSTER["RAY_preload_python_modules"].split(",")[0] == serve_guard.__name__


@pytest.mark.slow
def test_what_torch_imports_late_is_imported_ahead() -> None:
    code = (
        "import sys, torch; assert 'torch._dynamo' not in sys.modules; torch.manual_seed(0); "
        "torch.optim.SGD([torch.zeros(1)], lr=1.0); print('torch._dynamo' in sys.modules); "
        "from shoal.cluster.imports import MODULES; print('torch._dynamo' in MODULES)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ray_edge.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", imports.MODULES)
def test_what_is_imported_ahead_can_be_imported(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


def test_workers_are_as_nice_as_anything_else() -> None:
    assert CLUSTER[ray_edge.WORKER_NICENESS] == "0"


def test_the_callback_is_what_it_is_called() -> None:
    module, _, function = CLUSTER["RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"].partition(":")
    assert module == serve_guard.__name__
    assert not inspect.signature(getattr(serve_guard, function)).parameters


def test_a_renamed_process_keeps_its_environment() -> None:
    code = (
        "import ray._raylet as r, os; r.setproctitle('ray::IDLE'); "
        "print(b'SHOAL_CLUSTER_ID=x' in open(f'/proc/{os.getpid()}/environ', 'rb').read())"
    )
    marks = {"SHOAL_CLUSTER_ID": "x", "SPT_NOENV": CLUSTER["SPT_NOENV"]}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **marks}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


def test_ray_can_be_told_to_read_its_environment_again() -> None:
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config

    assert callable(Config.initialize)
    assert callable(AuthenticationTokenLoader.instance().reset_cache)
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)


def function_source(path: str, name: str) -> str:
    """The text of a function or method in a file of Ray's, up to the next one that begins at its depth."""
    found = re.search(rf"(?ms)^( *)def {name}\(.*?(?=^\1(?:def|class|async|@)|\Z)", source(path))
    assert found is not None, f"{path} has no {name}"
    return found[0]


def test_ray_starts_workers_with_what_it_takes_for_python() -> None:
    command = function_source("_private/services.py", "start_raylet").partition("start_worker_command = (")[2]
    assert re.match(r"\s*\[\s*sys\.executable,\s*setup_worker_path,\s*\]\s*\+ _site_flags\(\)", command)
    assert re.search(r"\]\s*\+ _site_flags\(\)[^+]*\+ \[\s*worker_path,", command)


def test_the_scripts_of_workers_are_called_as_the_launcher_knows_them() -> None:
    assert (SITE / "_private/workers" / worker_launch._SETUP).exists()
    assert (SITE / "_private/workers" / worker_launch._WORKER).exists()
    constants = source("_private/ray_constants.py")
    assert f'SETUP_WORKER_FILENAME = "{worker_launch._SETUP}"' in constants
    # The raylet takes it out of the command of a worker that has no runtime environment.
    assert worker_launch._SETUP.encode() in (SITE / "core/src/ray/raylet/raylet").read_bytes()


def test_a_worker_is_prepared_by_the_flags_that_the_launcher_takes_away() -> None:
    flags = re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source(f"_private/workers/{worker_launch._SETUP}"))
    assert sorted(f"{flag}=" for flag in flags) == sorted(worker_launch._NOT_THE_WORKERS)


def test_a_runtime_environment_says_no_more_than_the_launcher_reads() -> None:
    from ray._private.runtime_env.context import RuntimeEnvContext

    plain = RuntimeEnvContext()
    assert json.loads(plain.serialize()) == {
        "command_prefix": [],
        "env_vars": {},
        "py_executable": sys.executable,
        "override_worker_entrypoint": None,
        "java_jars": [],
    }
    read = inspect.getsource(worker_launch.plan)
    assert [name for name in vars(plain) if f'"{name}"' not in read] == []
    worker = [f"/ray/{worker_launch._WORKER}", f"{worker_launch._CONTEXT}{plain.serialize()}"]
    assert worker_launch.plan(worker, {}, sys.executable, "/") is not None


def test_a_prepared_worker_runs_what_the_launcher_hands_over() -> None:
    text = function_source("_private/runtime_env/context.py", "exec_worker")
    assert set(re.findall(r"self\.(\w+)", text)) == {
        "command_prefix",
        "env_vars",
        "py_executable",
        "override_worker_entrypoint",
        "java_jars",
    }
    assert "cmd = [*self.command_prefix, *executable, *passthrough_args]" in text
    assert 'executable = ["exec", self.py_executable]' in text


def test_only_a_dollar_in_a_variable_of_a_runtime_environment_means_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray._private.utils import update_envs

    for name, value in {"PLAIN": "~ %A% `a` \\ {B}", "DOLLAR": "${NO_SUCH_VARIABLE}/x"}.items():
        monkeypatch.setenv(name, "")
        update_envs({name: value})
        assert (os.environ[name] == value) == ("$" not in value)


def test_the_folder_of_a_job_is_a_change_of_folder() -> None:
    text = source("_private/runtime_env/working_dir.py")
    assert 'context.command_prefix += ["cd", shlex.quote(str(local_dir)), "&&"]' in text
    prefixes = re.findall(r"command_prefix \+?= \[(.*)\]", text)
    assert [prefix for prefix in prefixes if '"/d"' not in prefix] == [
        '"cd", shlex.quote(str(local_dir)), "&&"'
    ]  # the other one is for Windows


@pytest.mark.parametrize("name", [template._RAYLET, template._JOB])
def test_rays_core_reads_what_a_copy_is_told_of(name: str) -> None:
    assert name.encode() in (SITE / "_raylet.so").read_bytes()


def test_rays_core_follows_the_environment_when_it_is_told_to() -> None:
    code = (
        "import os; from ray._raylet import Config; from shoal.cluster import ray_edge\n"
        "def read(): return Config.worker_register_timeout_seconds(), Config.health_check_period_ms()\n"
        "before = read(); os.environ['RAY_worker_register_timeout_seconds'] = '61'; late = read()\n"
        "ray_edge.reread_settings(); print(before, late, read())"
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": str(Path(ray_edge.__file__).parents[2]),
        "RAY_health_check_period_ms": "3210",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "(60, 3210) (60, 3210) (61, 3210)", done.stderr


def copies_draw(before: str) -> list[str]:
    """The ids that two copies of a process draw which has run that first."""
    code = (
        "import os, ray, ray.actor; from shoal.cluster import ray_edge; original = ray.actor.ActorClassID\n"
        f"{before}\n"
        "for _ in range(2):\n"
        "    if (pid := os.fork()) == 0: os.write(1, ray_edge.random_id().hex().encode() + b' '); os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        "assert ray.actor.ActorClassID is original"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ray_edge.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_copies_draw_different_ids_where_rays_generator_is_untouched() -> None:
    make = "first, second = (ray.remote(type('Actor', (), {})) for _ in range(2))"
    first, second = copies_draw(
        f"with ray_edge.random_ids_untouched(): {make}\n"
        "ids = [made.__ray_metadata__.class_id for made in (first, second)]\n"
        "assert ids[0] != ids[1] and [type(found) for found in ids] == [original] * 2"
    )
    assert first != second
    first, second = copies_draw(make)
    assert first == second, "Ray seeds its generator in every copy by now: random_ids_untouched can go"


CONFIG = """\
global
    stats socket /run/a mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout client 3600s
frontend prometheus
    bind :20013
frontend http_frontend
    bind 127.0.0.1:20011
listen stats
  bind *:20012
"""


def test_mending_closes_the_side_doors() -> None:
    mended = haproxy_launch.mend(CONFIG, ["20012", "20013"], "127.0.0.1:20011")
    assert re.findall(r"bind (\S+)", mended) == ["127.0.0.1:20013", "127.0.0.1:20011", "127.0.0.1:20012"]
    assert "mode 600 level admin" in mended


def test_mending_bounds_the_time_for_headers() -> None:
    mended = haproxy_launch.mend(CONFIG, ["20012", "20013"], "127.0.0.1:20011")
    assert "defaults\n    timeout http-request 10s\n    mode http\n" in mended
    own = CONFIG.replace("timeout client", "timeout http-request 5s\n    timeout client")
    assert re.findall(
        r"timeout http-request (\S+)", haproxy_launch.mend(own, ["20012", "20013"], "127.0.0.1:20011")
    ) == ["5s"]


def test_mending_twice_changes_nothing() -> None:
    mended = haproxy_launch.mend(CONFIG, ["20012", "20013"], "127.0.0.1:20011")
    assert haproxy_launch.mend(mended, ["20012", "20013"], "127.0.0.1:20011") == mended


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bind 127.0.0.1:20011", "bind *:20011"),
        ("bind 127.0.0.1:20011", "bind *:9999"),
        ("bind :20013", "bind :9101"),
        ("mode 666", "mode 644"),
        ("bind *:20012", "bind [::]:20012"),
        ("defaults", "defaults unnamed"),
    ],
)
def test_what_is_not_as_expected_is_refused(old: str, new: str) -> None:
    with pytest.raises(ValueError, match=r"bind|stats socket|defaults"):
        haproxy_launch.mend(CONFIG.replace(old, new), ["20012", "20013"], "127.0.0.1:20011")


def test_serve_beyond_loopback_is_let_through_when_the_file_says_so() -> None:
    text = CONFIG.replace("bind 127.0.0.1:20011", "bind *:20011")
    assert "bind *:20011" in haproxy_launch.mend(text, ["20012", "20013"], "*:20011")


def test_every_port_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    documented = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"(?m)^\| `[^|]+\|", text))))
    assert set(PORTS) <= documented
