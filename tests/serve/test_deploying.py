"""What is sent to Ray, decided without Ray; and on a real cluster, what a user meets."""

from __future__ import annotations

import json
import os
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.config import Range, Serve
from shoal.errors import AccessError, ClusterError, CorruptError, NotFoundError, RequestError
from shoal.serve.builder import deployment_options
from shoal.serve.deploying import app_config, reason_of
from shoal.storage import Storage
from waiting import wait_until

VERSION_2 = {"model": "digits", "version": 2, "path": "/models/digits/2"}
PIXELS = {"pixels": [[0, 0, 0, 8, 14, 0, 0, 0]] * 8}


def test_first_app_answers_at_the_root_and_later_ones_under_their_name() -> None:
    first = app_config("digits", "a:app", VERSION_2, [], before=None)
    assert first["route_prefix"] == "/"
    assert app_config("other", "a:app", VERSION_2, [first], before=None)["route_prefix"] == "/other"


def test_a_new_version_keeps_what_would_make_ray_replace_replicas() -> None:
    before = {
        "name": "digits",
        "route_prefix": "/x",
        "import_path": "a:app",
        "args": {"model": "digits@champion"},
        "deployments": [{"name": "endpoint", "user_config": {"version": 1}}],
    }
    after = app_config("digits", "a:app", VERSION_2, [before], before=before)
    assert {key: after[key] for key in ("route_prefix", "import_path", "args")} == {
        "route_prefix": "/x",
        "import_path": "a:app",
        "args": {"model": "digits@champion"},
    }
    assert after["deployments"] == [{"name": "endpoint", "user_config": VERSION_2}]


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", "a b", "a\n", "-a", "x" * 81, "predict", "model", "docs"]
)
def test_a_name_that_would_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="name"):
        app_config(name, "a:app", VERSION_2, [{"route_prefix": "/"}], before=None)


def test_no_app_can_have_the_name_of_a_route_but_the_one_at_the_root() -> None:
    from shoal.serve.endpoint import Endpoint
    from shoal.serve.routes import OWN_PATHS, build_routes

    paths = {route.path for route in build_routes(Endpoint()).routes}  # type: ignore[attr-defined]
    assert {path for path in paths if path.count("/") == 1} == OWN_PATHS
    assert app_config("model", "a:app", VERSION_2, [], before=None)["route_prefix"] == "/"


def test_a_name_whose_route_is_taken_is_refused() -> None:
    others = [{"route_prefix": "/"}, {"route_prefix": "/b"}]
    with pytest.raises(RequestError, match="another name"):
        app_config("b", "a:app", VERSION_2, others, before=None)


def test_ray_accepts_what_we_send_and_the_bounds_are_set() -> None:
    from ray.serve.schema import DeploymentSchema, ServeDeploySchema

    fixed = DeploymentSchema(name="endpoint", **deployment_options(Serve(replicas=Range(3, 3), max_queue=50)))
    assert fixed.num_replicas == 3
    assert 50 < fixed.max_queued_requests < 10_000, "bounded, and not before the gate's bound"
    assert fixed.max_ongoing_requests > 50, "the gate must refuse first, in its own words"
    assert fixed.max_surge_percent == 100
    elastic = deployment_options(Serve(replicas=Range(1, 4)))
    assert DeploymentSchema(name="endpoint", **elastic).autoscaling_config
    assert elastic["autoscaling_config"]["max_replicas"] == 4
    assert elastic["autoscaling_config"]["upscale_delay_s"] <= 2, "Ray's own delay is 30 s"
    ServeDeploySchema(applications=[app_config("digits", "a:app", VERSION_2, [], before=None)])  # type: ignore[list-item]


def test_reasons_come_without_stack_traces() -> None:
    text = (
        "Deploying app 'x' failed with exception:\nTraceback (most recent call last):\n"
        '  File "a.py", line 1, in f\n    f()\nray.exceptions.RayTaskError(ValueError): ray::f()\n'
        "ValueError: the number is odd"
    )
    found = reason_of({"deployments": {}, "message": text})
    assert found == "Deploying app 'x' failed with exception:\nValueError: the number is odd"
    assert reason_of({"message": ""}) == "no reason given"


def test_exported_names_are_not_hidden_by_modules() -> None:
    import importlib

    import shoal.serve

    for module in ("builder", "deploying", "handle", "endpoint", "rest"):
        importlib.import_module(f"shoal.serve.{module}")
    for name in shoal.serve.__all__:
        assert callable(getattr(shoal.serve, name)), f"shoal.serve.{name} is a module"


def test_importing_an_app_loads_neither_ray_nor_torch_nor_fastapi() -> None:
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    code = (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'platform')!r}]; import serve_apps.digits; "
        "print(sorted({'ray', 'torch', 'fastapi', 'mlflow', 'starlette'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


# On a real cluster, shared by the session (the `cluster` fixture gives its ClusterInfo, attached).


@pytest.fixture(scope="module")
def served(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two versions of the digits model, and the first of them served."""
    from test_endpoint import write_version_to

    from shoal.serve import deploy
    from shoal.tracking.actor import open_registry

    registry = open_registry(cluster)
    first = registry.register(
        "served", lambda path, version: write_version_to(path, "served", version, always=3)
    )
    second = registry.register(
        "served", lambda path, version: write_version_to(path, "served", version, always=5)
    )
    app = deploy(cluster, "serve_apps.digits:app", model=str(first), name="served")
    yield app, first, second
    app.delete()


@pytest.mark.cluster
def test_served_app_answers_pictures_and_pixels(served: Any, cluster: Any, tmp_path: Path) -> None:
    from test_endpoint import drawn, png

    from shoal.serve import deploy

    app, first, _ = served
    deploy(cluster, "serve_apps.digits:app", model=str(first), name="served")
    picture = tmp_path / "one.png"
    picture.write_bytes(png(drawn()))
    for sample in (picture, picture.read_bytes(), PIXELS, PIXELS["pixels"]):
        answer = app.predict(sample)
        assert (answer["class"], answer["version"]) == (3, first.version)
    with pytest.raises(RequestError, match="8 x 8"):
        app.predict([[1] * 8] * 7)
    assert app.status().state == "RUNNING"
    assert app.status().replicas >= 1
    with urllib.request.urlopen(f"{app.url}/openapi.json", timeout=10) as response:
        assert "/predict" in json.load(response)["paths"]


@pytest.mark.cluster
def test_prometheus_reads_what_a_replica_counted(served: Any, cluster: Any) -> None:
    from shoal.serve import deploy

    app, first, _ = served
    deploy(cluster, "serve_apps.digits:app", model=str(first), name="served")
    for _ in range(3):
        app.predict(PIXELS)
    with pytest.raises(RequestError):
        app.predict([[1]])
    url = f"http://127.0.0.1:{cluster.ports['metrics_export']}/metrics"
    ours, model = {"application": "served"}, {"application": "served", "model": str(first)}
    wanted: list[tuple[str, dict[str, str], float]] = [
        ("ray_shoal_answers_total", {**model, "status": "200"}, 3),
        ("ray_shoal_answers_total", {**model, "status": "422"}, 1),
        ("ray_shoal_batches_total", {**ours, "le": "1"}, 3),
        ("ray_shoal_batches_total", {**ours, "le": "+Inf"}, 3),
        ("ray_shoal_batched_requests_total", ours, 3),
        ("ray_shoal_model_loaded", model, 1),
        # Ray's own, on which docs/serving.md relies.
        ("ray_serve_num_http_requests_total", {**ours, "method": "POST", "status_code": "422"}, 1),
        ("ray_serve_http_request_latency_ms_bucket", {**ours, "status_code": "200", "le": "+Inf"}, 3),
        ("ray_serve_replica_processing_queries", ours, 0),
    ]

    def missing() -> list[Any]:
        with urllib.request.urlopen(url, timeout=10) as response:
            page = response.read().decode()
        return [each for each in wanted if _sum_of(page, each[0], each[1]) < each[2]]

    # A replica exports every 5 s, Ray every 10 s.
    wait_until(lambda: not missing(), lambda: f"the page has {missing()}")


@pytest.mark.cluster
def test_a_new_version_comes_in_place_without_losing_a_request(served: Any, cluster: Any) -> None:
    from shoal.serve import deploy

    app, first, second = served
    deploy(cluster, "serve_apps.digits:app", model=str(first), name="served")
    pid_before = _replica_pids(cluster, "served")
    stop = threading.Event()
    seen: list[Any] = []

    def caller() -> None:
        while not stop.is_set():
            try:
                answer = app.predict(PIXELS)
                seen.append((answer["version"], answer["class"]))
            except ClusterError as error:
                seen.append(error)

    threads = [threading.Thread(target=caller) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        changed = deploy(cluster, "serve_apps.digits:app", model=str(second), name="served")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert changed.model == str(second)
    assert set(seen) <= {(first.version, 3), (second.version, 5)}, "no error, and no answer of a mixture"
    assert app.predict(PIXELS)["version"] == second.version
    assert _replica_pids(cluster, "served") == pid_before, "in place: the same processes"


@pytest.mark.cluster
def test_one_deploy_never_deletes_another(served: Any, cluster: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from shoal.serve import apps, deploy

    app, first, _ = served
    deploy(cluster, "serve_apps.digits:app", model=str(first), name="served")
    names = ["second", "third"]
    with ThreadPoolExecutor(2) as pool:
        others = list(
            pool.map(
                lambda name: deploy(cluster, "serve_apps.digits:app", model=str(first), name=name), names
            )
        )
        assert {"served", *names} <= {running.name for running in apps(cluster)}
        for running in (app, *others):
            assert running.predict(PIXELS)["version"] == first.version
        list(pool.map(lambda other: other.delete(), others))
    with pytest.raises(NotFoundError, match="no app 'third'"):
        others[1].delete()
    assert app.predict(PIXELS)["version"] == first.version


@pytest.mark.cluster
def test_what_cannot_be_deployed_changes_nothing(served: Any, cluster: Any) -> None:
    from test_endpoint import write_version_to

    from shoal.serve import apps, deploy
    from shoal.tracking.actor import open_registry

    app, first, _ = served
    deploy(cluster, "serve_apps.digits:app", model=str(first), name="served")
    for model, error in (
        ("served@nobody", NotFoundError),
        ("served@999", NotFoundError),
        ("none", NotFoundError),
    ):
        with pytest.raises(error):
            deploy(cluster, "serve_apps.digits:app", model=model, name="served")
    for import_path in ("serve_apps.digits", ":app", "serve_apps.nothing:app"):
        with pytest.raises(RequestError):
            deploy(cluster, import_path, model=str(first), name="served")
    damaged = open_registry(cluster).register(
        "served", lambda path, version: write_version_to(path, "served", version)
    )
    weights = damaged.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CorruptError):
        deploy(cluster, "serve_apps.digits:app", model=str(damaged), name="served")
    assert app.predict(PIXELS)["version"] == first.version
    assert app.name in {running.name for running in apps(cluster)}


def test_beyond_loopback_without_keys_is_refused() -> None:
    from shoal.serve.builder import serve_settings

    config = {"version": 1, "name": "x", "head": {"cpu": 1, "memory": "1Gi"}, "serve": {"host": "0.0.0.0"}}
    with pytest.raises(AccessError, match=r"serve\.keys_file"):
        serve_settings(SimpleNamespace(config=config))  # type: ignore[arg-type]


@pytest.mark.parametrize("written", ["~/keys.txt", "keys.txt", "/etc/keys.txt"])
def test_client_and_replicas_read_the_keys_where_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    from shoal.serve import Endpoint, builder, handle
    from shoal.serve.core import keys

    monkeypatch.setenv("HOME", "/home/ann")
    expected = {"~": "/home/ann/keys.txt", "k": f"{tmp_path}/keys.txt", "/": "/etc/keys.txt"}[written[0]]
    config = {"version": 1, "name": "x", "serve": {"keys_file": written}}
    info = SimpleNamespace(config=config, project=tmp_path, storage=tmp_path)
    monkeypatch.setattr(keys, "read_keys", lambda path: [str(path)])
    assert handle._key_header(info) == {"X-API-Key": expected}  # type: ignore[arg-type]

    bound: dict[str, Any] = {}
    deployment = SimpleNamespace(bind=lambda **arguments: bound.update(arguments))
    monkeypatch.setattr("ray.serve.deployment", lambda *_, **__: deployment)
    builder._bind(Endpoint, info, {})  # type: ignore[arg-type]
    assert bound["keys_file"] == expected
    logs_dir = Storage(tmp_path).app_logs_dir
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (logs_dir, logs_dir.parent)] == [0o700] * 2


def test_only_the_newest_logs_of_replicas_are_kept_and_those_of_live_ones(tmp_path: Path) -> None:
    from shoal.serve.replica_logs import prune

    prune(tmp_path / "not yet", live=())
    names = [f"replica_digits_endpoint_{letter}.log" for letter in "abcde"] + [
        "replica_digits_endpoint_a.log.1",
        "other.log",
    ]
    for age, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    prune(tmp_path, live={"d"}, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[1], names[3], "other.log"}


def _sum_of(page: str, name: str, labels: dict[str, str]) -> float:
    """The sum of a metric over the series with these labels on a Prometheus page; -1 where there is none."""
    values = [
        float(line.rpartition(" ")[2])
        for line in page.splitlines()
        if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items())
    ]
    return sum(values) if values else -1.0


def _replica_pids(cluster: Any, name: str) -> set[int]:
    from shoal.serve.rest import read_serve

    deployments = read_serve(cluster)["applications"][name]["deployments"].values()
    return {replica["pid"] for deployment in deployments for replica in deployment["replicas"]}
