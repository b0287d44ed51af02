"""Deploy and delete apps by saying what the cluster should run; changes are made in place where possible.

Ray's declarative call names *all* apps and deletes the ones it does not name. So each change here reads what
runs, alters one app, and sends the whole back, under a lock that all processes of the project share.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import ClusterError, DeadlineExceeded, NotFoundError, RequestError, did_you_mean
from shoal.serve import replica_logs
from shoal.serve.builder import DEPLOYMENT, resolve, serve_settings
from shoal.serve.handle import App, answering_model
from shoal.serve.rest import read_serve, write_serve
from shoal.serve.routes import OWN_PATHS
from shoal.storage import Storage

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo

DEADLINE_S = 180.0
"""A first deploy starts Serve, HAProxy and replicas that import torch: some 15 s, several times that on a
busy machine."""
_POLL_S = 0.1
_SETTLE_S = 10.0
"""How long replicas that Ray calls up to date may still answer with another version."""

_TRACE = r"\s|$|(\w+: )?Traceback |The above exception|During handling|ray(\.exceptions\.Ray|::)"
"""How the lines of a stack trace begin that say nothing about what went wrong."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
"""Of an app: it is a part of URLs and of log files' names."""

AppConfig = dict[str, Any]
"""One app as Ray's `ServeApplicationSchema` has it."""


def deploy(
    info: ClusterInfo,
    import_path: str,
    *,
    model: str,
    name: str | None = None,
    deadline_s: float = DEADLINE_S,
    say: Callable[[str], None] = lambda text: None,
) -> App:
    """Serve ``import_path`` (``serve_apps.digits:app``) with ``model`` (``digits@champion``); waits for it.

    The model is resolved and its files are verified now; all replicas get that one version. An app of this
    name that runs already changes in place: no replica restarts for a new version, no request is lost. Other
    apps are left as they are. When the app cannot be brought up, what ran before is put back.

    ``name`` defaults to the module's, ``digits``. The first app answers at ``/``, later ones at ``/<name>``.
    ``say`` is told when the wait begins: all that is asked for was found by then.

    Raises:
        NotFoundError: no such model, version or alias.
        CorruptError: the model's files were changed.
        AccessError: beyond loopback without keys.
        RequestError: ``import_path`` is not ``module:name``; NotFoundError: no such module.
        ClusterError: the app does not come up; holds Ray's message.
        DeadlineExceeded: it is not up after ``deadline_s``; it goes on starting.
    """
    from shoal.models import ModelPackage

    module = _module_of(info, import_path)
    name = name or module.rpartition(".")[2]
    serve_settings(info)
    user_config = resolve(info, model)
    resolved = f"{user_config['model']}@{user_config['version']}"
    package = ModelPackage.open(Path(user_config["path"]), expect=resolved)
    say(f"deploying {import_path} with {resolved} (a first deploy takes some 20 s)")
    with _changing(info, timeout_s=deadline_s) as running:
        before = running.get(name)
        running[name] = app_config(name, import_path, user_config, running.values(), before=before)
        _send(info, running)
        prefix = running[name]["route_prefix"]
        app = App(name=name, url=info.serve_url + prefix.rstrip("/"), model=package.name, info=info)
        try:
            _wait_running(info, name, deadline_s=deadline_s)
        except ClusterError:
            _send(info, {**running, name: before} if before else _without(running, name))
            raise
    _wait_answers(app, _SETTLE_S)
    _prune_logs(info)
    return app


def delete(
    info: ClusterInfo,
    name: str,
    *,
    deadline_s: float = DEADLINE_S,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Take an app off the cluster; blocks until its replicas are gone. Requests in flight are finished first.

    ``say`` is told when the wait begins: the app was found by then.

    Raises:
        NotFoundError: no app of this name runs.
        DeadlineExceeded: it is not gone after ``deadline_s``.
    """
    with _changing(info, timeout_s=deadline_s) as running:
        if name not in running:
            there = ", ".join(sorted(running)) or "none"
            raise NotFoundError(f"there is no app {name!r}; running: {there}{did_you_mean(name, running)}")
        say(f"deleting app {name} (some 6 s: requests in flight are finished first)")
        _send(info, _without(running, name))

    def is_gone() -> bool:
        return name not in read_serve(info)["applications"]

    _wait(is_gone, deadline_s, lambda: f"app {name!r} to be gone")


def apps(info: ClusterInfo) -> list[App]:
    """The apps that run or are being started, by name."""
    return [
        App(
            name=name,
            url=info.serve_url + (details["route_prefix"] or "").rstrip("/"),
            model=_model_of(details.get("deployed_app_config") or {}),
            info=info,
        )
        for name, details in sorted(read_serve(info)["applications"].items())
    ]


def app_config(
    name: str,
    import_path: str,
    user_config: Mapping[str, Any],
    others: Iterable[Mapping[str, Any]],
    *,
    before: Mapping[str, Any] | None,
) -> AppConfig:
    """The app as Ray's schema wants it. Pure.

    The version goes into ``user_config``, never into ``args``: Ray replaces all replicas when those change.
    ``args`` stays what it was for the same reason.

    Raises:
        RequestError: a new app cannot have that name, or the route that goes with it.
    """
    taken = {other.get("route_prefix", "/") for other in others}
    prefix = before.get("route_prefix", "/") if before else "/" if "/" not in taken else f"/{name}"
    if prefix in taken and not before:
        raise RequestError(f"another app answers at {prefix}; choose another name than {name!r}")
    if before is None:
        _check_name(name, prefix)
    same_code = before is not None and before["import_path"] == import_path
    args = dict(before.get("args", {})) if before is not None and same_code else {}
    return {
        "name": name,
        "route_prefix": prefix,
        "import_path": import_path,
        "args": args,
        "deployments": [{"name": DEPLOYMENT, "user_config": dict(user_config)}],
    }


def _check_name(name: str, prefix: str) -> None:
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{name!r} cannot name an app: use 1 to 80 of letters, digits, '.', '_' and '-', "
            "beginning with a letter or a digit"
        )
    if prefix in OWN_PATHS:
        raise RequestError(
            f"{name!r} cannot name an app: it would answer at {prefix} in the place of the app at /. "
            f"Give it another name: --name {name}-app"
        )


@contextmanager
def _changing(info: ClusterInfo, *, timeout_s: float = DEADLINE_S) -> Iterator[dict[str, AppConfig]]:
    """The declarative apps that run, by name; no other process of the project changes them meanwhile."""
    from shoal.storage import FileLock

    lock = FileLock(info.record.with_name("serve.lock"))
    lock.acquire(timeout_s=timeout_s)
    try:
        details = read_serve(info)["applications"]
        yield {
            name: app["deployed_app_config"]
            for name, app in details.items()
            if app.get("deployed_app_config") and app["status"] != "DELETING"
        }
    finally:
        lock.release()


def _send(info: ClusterInfo, running: Mapping[str, AppConfig]) -> None:
    settings = serve_settings(info)
    http_options = {"host": settings.host, "port": info.serve_port}
    write_serve(info, {"http_options": http_options, "applications": list(running.values())})


def _prune_logs(info: ClusterInfo) -> None:
    live = {
        replica["replica_id"]
        for app in read_serve(info)["applications"].values()
        for deployment in (app.get("deployments") or {}).values()
        for replica in deployment.get("replicas") or ()
    }
    replica_logs.prune(Storage(info.storage).app_logs_dir, live=live)


def _wait_running(info: ClusterInfo, name: str, *, deadline_s: float) -> None:
    state: dict[str, Any] = {}

    def is_running() -> bool:
        state.update(read_serve(info)["applications"].get(name) or {"status": "NOT_STARTED"})
        if state["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ClusterError(f"app {name!r} did not come up: {reason_of(state)}")
        if state["status"] != "RUNNING":
            return False
        return all(deployment["status"] == "HEALTHY" for deployment in state["deployments"].values())

    _wait(
        is_running, deadline_s, lambda: f"app {name!r} to run (it is {state['status']}: {reason_of(state)})"
    )


def reason_of(details: Mapping[str, Any]) -> str:
    """Why an app is in the state it is in: Ray's messages on its deployments, without their stack traces."""
    deployments = details.get("deployments") or {}
    messages = [deployment.get("message", "") for deployment in deployments.values()]
    messages = [text for text in messages if text] or [details.get("message", "")]
    return "\n".join(dict.fromkeys(_without_traces(text) for text in messages)) or "no reason given"


def _without_traces(text: str) -> str:
    """Ray's message with each stack trace reduced to the exception at its end."""
    is_trace = re.compile(_TRACE).match
    kept = [line for line in text.splitlines() if not is_trace(line)]
    return "\n".join(kept[:1] + kept[1:][-5:])[:3000]


def _wait_answers(app: App, deadline_s: float) -> None:
    """Wait until every replica answers with the deployed version.

    A replica that cannot load a version keeps the one before, and Ray does not notice. HAProxy takes replicas
    in turn, so as many equal answers in a row as there are replicas, twice over, mean all of them.
    """
    wanted = 2 * max(1, app.status().replicas)
    seen: list[str] = []

    def all_equal() -> bool:
        seen.append(answering_model(app.url))
        return seen[-wanted:] == [app.model] * wanted

    try:
        _wait(all_equal, deadline_s, lambda: "", poll_s=0.02)
    except DeadlineExceeded:
        raise ClusterError(
            f"app {app.name!r} should answer with {app.model}, not with {sorted(set(seen[-wanted:]))}. "
            f"A replica could not load it; its log says why: shoal logs {app.name}"
        ) from None


def _wait(
    is_done: Callable[[], bool], deadline_s: float, what: Callable[[], str], *, poll_s: float = _POLL_S
) -> None:
    deadline = time.monotonic() + deadline_s
    while not is_done():
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"waited {deadline_s:.0f} s for {what()}")
        time.sleep(poll_s)


def _module_of(info: ClusterInfo, import_path: str) -> str:
    """The module of an import path, which is there; Ray would notice much later that it is not."""
    module, colon, attribute = import_path.partition(":")
    if not (module and colon and attribute):
        raise RequestError(
            f"{import_path!r} is not an import path; write MODULE:NAME such as serve_apps.digits:app"
        )
    sys.path.insert(0, str(info.project))
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    finally:
        sys.path.remove(str(info.project))
    if not found:
        raise NotFoundError(f"there is no module {module!r} in {info.project} or on the path")
    return module


def _without(running: Mapping[str, AppConfig], name: str) -> dict[str, AppConfig]:
    return {other: config for other, config in running.items() if other != name}


def _model_of(config: Mapping[str, Any]) -> str:
    for deployment in config.get("deployments") or ():
        user_config = deployment.get("user_config") or {}
        if deployment.get("name") == DEPLOYMENT and user_config:
            return f"{user_config['model']}@{user_config['version']}"
    return str((config.get("args") or {}).get("model", ""))
