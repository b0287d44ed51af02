"""The digits model on Ray Serve as one would write it by hand, to compare with: no checks and no limits."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ray import serve
from starlette.requests import Request


class HandWritten:
    """Loads the package once; answers the same JSON and PNG requests as the digits app."""

    def __init__(self, package: str) -> None:
        import torch

        from shoal.models import ModelPackage

        torch.set_num_threads(1)
        self._net = ModelPackage.open(Path(package)).load()

    async def __call__(self, request: Request) -> dict[str, Any]:
        import torch

        pixels = await _pixels(request)
        with torch.inference_mode():
            probabilities = self._net(pixels[None])[0].softmax(dim=0)
        return {"class": int(probabilities.argmax()), "probabilities": probabilities.tolist()}


class HandBatched(HandWritten):
    """The same with Ray Serve's own batching."""

    async def __call__(self, request: Request) -> dict[str, Any]:
        return await self._predict(await _pixels(request))

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def _predict(self, samples: list[Any]) -> list[dict[str, Any]]:
        import torch

        with torch.inference_mode():
            rows = self._net(torch.stack(samples)).softmax(dim=1).tolist()
        return [{"class": row.index(max(row)), "probabilities": row} for row in rows]


async def _pixels(request: Request) -> Any:
    import io

    import numpy as np
    import torch
    from PIL import Image

    if request.headers["content-type"] == "application/json":
        return torch.tensor((await request.json())["pixels"], dtype=torch.float32) / 16
    image = Image.open(io.BytesIO(await request.body())).convert("L").resize((8, 8))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def default(args: dict[str, Any]) -> serve.Application:
    """Nothing but the defaults: at most 5 requests in a replica, and a router that backs off up to 0.5 s beyond."""
    return serve.deployment(HandWritten, name="default").bind(args["package"])


def tuned(args: dict[str, Any]) -> serve.Application:
    """With the one setting that 32 connections need."""
    return serve.deployment(HandWritten, name="tuned", max_ongoing_requests=256).bind(args["package"])


def batched(args: dict[str, Any]) -> serve.Application:
    """`tuned` with Ray Serve's batching on top."""
    return serve.deployment(HandBatched, name="batched", max_ongoing_requests=256).bind(args["package"])


def main(package: str, port: int) -> None:
    """Serve `default` and `tuned` on Ray's default proxy in a cluster of its own until standard input ends."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    for build in (default, tuned):
        serve.run(build({"package": package}), name=build.__name__, route_prefix=f"/{build.__name__}")
    print("ready", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ, "the stock peers run on Ray's default proxy"
    main(sys.argv[1], int(sys.argv[2]))
