"""The contract with Ray's private parts: fails, name by name, when an upgrade moves one."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.cluster import haproxy_launch, imports, ports, ray_edge, serve_guard

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
def test_what_torch_imports_late_is_preloaded() -> None:
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
def test_what_is_preloaded_can_be_imported(name: str) -> None:
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
