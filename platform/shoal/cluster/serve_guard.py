"""Keep Serve's listeners where the cluster's record says, whoever starts Serve and however.

Serve behind HAProxy listens on every interface and on port 8000 unless whoever starts it says otherwise, and
``serve deploy`` with a file that holds only applications says nothing: proxies and replicas would be open to
the network, and two clusters would meet on port 8000. So the cluster itself decides:

- ``RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH`` names ``pin_http_options``, which Serve's controller calls
  just before it reads the options;
- ``RAY_preload_python_modules`` names this module, so that every worker process imports it before it becomes
  a replica, whose server for calls between deployments would otherwise listen on every interface (behind the
  token).

Both touch private names; ``tests/cluster/test_cluster_ray_edge.py`` says when they move.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from shoal.cluster.ray_edge import LOOPBACK, SERVE_HOST, SERVE_PORT

_ALL_INTERFACES = "[::]:"


def pin_http_options() -> None:
    """Make this process, Serve's controller, listen on the recorded host and port whatever it was told."""
    from ray.serve._private import controller

    host, port = os.environ[SERVE_HOST], int(os.environ[SERVE_PORT])
    original = controller.configure_http_options_with_defaults

    @functools.wraps(original)
    def pinned(http_options: Any) -> Any:
        return original(http_options.model_copy(update={"host": host, "port": port}))

    controller.configure_http_options_with_defaults = pinned


def pin_grpc_servers() -> None:
    """Make gRPC servers that this process will start listen on loopback instead of every interface."""
    from ray._common import tls_utils

    original = tls_utils.add_port_to_grpc_server

    @functools.wraps(original)
    def pinned(server: Any, address: str) -> Any:
        if address.startswith(_ALL_INTERFACES):
            address = f"{LOOPBACK}:{address.removeprefix(_ALL_INTERFACES)}"
        return original(server, address)

    tls_utils.add_port_to_grpc_server = pinned


if SERVE_HOST in os.environ:  # in a cluster's process; importing this elsewhere changes nothing
    pin_grpc_servers()
