"""From an `Endpoint` to a Ray Serve application: replicas, bounds and timeouts come from the cluster's file.

`app` makes the *builder* that an import path such as ``serve_apps.digits:app`` names. Ray calls it in a task
on the cluster, under ``serve deploy`` and `shoal.serve.deploy` alike, so both get the same settings.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import AccessError, RequestError
from shoal.serve.core.gate import Limits
from shoal.serve.core.keys import Keys
from shoal.serve.endpoint import Endpoint
from shoal.storage import Storage, make_directories

if TYPE_CHECKING:
    from ray.serve import Application

    from shoal.cluster import ClusterInfo
    from shoal.config import Serve

logger = logging.getLogger(__name__)

DEPLOYMENT = "endpoint"
"""Name of the one deployment in every shoal app: a client can address it without importing the app."""


_FLOOD = 4096
"""Requests that a replica takes in to refuse them properly; beyond, Ray drops them with a plain 503."""


def app(endpoint: type[Endpoint]) -> Callable[[dict[str, Any]], Application]:
    """A builder for ``endpoint``, to be named by an import path: ``app = shoal.serve.app(Digits)``.

    The builder takes one argument, ``model``: a model, version or alias such as ``digits@champion``, which it
    resolves once, so that all replicas hold the same version. `shoal.serve.deploy` sends the resolved version
    itself and leaves it out.
    """

    def build(args: dict[str, Any]) -> Application:
        from shoal.cluster import ClusterInfo

        unknown = sorted(args.keys() - {"model"})
        if unknown:
            raise RequestError(f"an app takes the argument 'model', not {', '.join(map(repr, unknown))}")
        info = ClusterInfo.from_env()
        if info is None:
            raise RequestError("this app runs on a shoal cluster; start one with: shoal up")
        user_config = resolve(info, args["model"]) if args.get("model") else {}
        return _bind(endpoint, info, user_config)

    return build


def resolve(info: ClusterInfo, model: str) -> dict[str, Any]:
    """What ``model`` (``digits@champion``, ``digits@3``) means now, as the ``user_config`` of its replicas.

    Raises:
        NotFoundError: no such model, version or alias.
    """
    from shoal.cluster.attach import attach
    from shoal.tracking.actor import open_registry

    attach(info)
    resolved = open_registry(info).resolve(model)
    return {"model": resolved.model, "version": resolved.version, "path": str(resolved.path)}


def serve_settings(info: ClusterInfo) -> Serve:
    """The ``serve`` section of the file that the cluster was started from.

    Raises:
        AccessError: it binds beyond loopback without API keys.
    """
    from shoal.config import ClusterConfig, is_loopback

    settings = ClusterConfig.model_validate(info.config).serve
    if not is_loopback(settings.host) and settings.keys_file is None:
        raise AccessError(
            f"serve.host is {settings.host}, which others can reach, and there are no API keys. "
            "Set serve.keys_file to a file with one key per line, or serve.host to 127.0.0.1."
        )
    return settings


def keys_path(info: ClusterInfo) -> Path | None:
    """The file of API keys, absolute; None where the cluster asks for none."""
    from shoal.config import ClusterConfig

    return ClusterConfig.from_dict(info.config).keys_path(info.project)


def deployment_options(settings: Serve) -> dict[str, Any]:
    """Ray Serve's options for one app under the ``serve`` section ``settings``. Pure.

    Ray's defaults they replace are in docs/serving.md, with what each does to a user.
    """
    bounds: dict[str, Any] = {
        # The gate bounds what is inside a replica and says so in its own words, with a slot left for health
        # checks. Ray counts a request as queued until its handler runs, so a bound near ours would refuse a
        # burst first (seen with 40 callers and a queue of 8); its bound is for a flood only.
        "max_ongoing_requests": settings.max_queue + 16,
        "max_queued_requests": settings.max_queue + _FLOOD,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1},
        # A new version of the code starts before the old one stops: no downtime with one replica.
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": float(settings.request_timeout) + 5.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
    }
    replicas = settings.replicas
    if replicas.min == replicas.max:
        return {**bounds, "num_replicas": replicas.min}
    autoscaling = {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        # More than a batch in flight means that requests wait for a second forward.
        "target_ongoing_requests": float(max(2, settings.batch)),
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2.0,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 60.0,
    }
    return {**bounds, "autoscaling_config": autoscaling}


def _bind(endpoint: type[Endpoint], info: ClusterInfo, user_config: Mapping[str, Any]) -> Application:
    from ray import serve

    settings = serve_settings(info)
    keys_file = keys_path(info)
    logs_dir = Storage(info.storage).app_logs_dir
    make_directories(
        logs_dir
    )  # ours alone, as all of the storage is: Ray would let others read what apps print
    replica = serve.ingress()(_replica_class(endpoint))
    deployment = serve.deployment(
        replica,
        name=DEPLOYMENT,
        user_config=dict(user_config),
        ray_actor_options={"num_cpus": endpoint.num_cpus},
        # On storage, because Ray's own folder goes with the cluster. A line per request would only cost speed.
        logging_config={"logs_dir": str(logs_dir), "enable_access_log": False},
        **deployment_options(settings),
    )
    return deployment.bind(
        limits=Limits(
            max_body_bytes=int(settings.max_body),
            deadline_s=float(settings.request_timeout),
            max_queue=settings.max_queue,
        ),
        keys_file=None if keys_file is None else str(keys_file),
        batch_size=settings.batch,
        batch_wait_s=float(settings.batch_wait),
    )


def _replica_class(endpoint: type[Endpoint]) -> type[Any]:
    """The class that Ray runs in each replica: a thin edge around one ``endpoint``."""

    class Replica:
        def __init__(
            self, limits: Limits, keys_file: str | None, batch_size: int, batch_wait_s: float
        ) -> None:
            import torch

            # Ray lets torch use every core of the machine, in every replica.
            torch.set_num_threads(max(1, int(endpoint.num_cpus)))
            keys = None if keys_file is None else Keys.load(Path(keys_file))
            self._batch_size = batch_size
            self._endpoint = endpoint(
                limits=limits, keys=keys, batch_size=batch_size, batch_wait_s=batch_wait_s
            )

        def __serve_build_asgi_app__(self) -> Any:
            from shoal.serve.exported import export_metrics

            self._export = asyncio.get_running_loop().create_task(
                export_metrics(self._endpoint.meter, self._endpoint.version, batch_size=self._batch_size)
            )
            return self._endpoint.asgi()

        async def reconfigure(self, user_config: dict[str, Any]) -> None:
            """Load the version that ``user_config`` names, while the one before goes on answering.

            Ray stops a replica whose reconfigure raises. So only the first load may raise: later, a version
            that does not load leaves the one before in place, which `shoal.serve.deploy` sees and reports.
            """
            if not user_config:
                raise RequestError(
                    "no model was named for this app; write args: {model: NAME@ALIAS} in its YAML, or use: "
                    "shoal serve IMPORT_PATH --model NAME@ALIAS"
                )
            expect = (user_config["model"], user_config["version"])
            try:
                await asyncio.to_thread(self._endpoint.load, Path(user_config["path"]), expect=expect)
            except Exception:
                if self._endpoint.loaded is None:
                    raise
                logger.exception("%s@%s cannot be loaded; the version before stays", *expect)

        def check_health(self) -> None:
            self._endpoint.check_health()

    Replica.__name__ = Replica.__qualname__ = endpoint.__name__
    return Replica
