"""What a user subclasses to say how requests become tensors and outputs become answers. Needs no Ray.

One `Endpoint` instance lives in each replica and holds one model version at a time. It also runs by itself,
under plain uvicorn::

    endpoint = Digits()
    endpoint.load(Path("models/digits/3"))
    uvicorn.run(endpoint.asgi())
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from shoal.errors import ClusterError
from shoal.serve.core import picture, upload
from shoal.serve.core.answer import Answer, Refusal, no_model
from shoal.serve.core.batch import Batcher
from shoal.serve.core.gate import Call, Gate, Limits
from shoal.serve.core.keys import Keys
from shoal.serve.core.meter import Meter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor, nn

    from shoal.models import ModelPackage

logger = logging.getLogger(__name__)

_INLINE_BELOW_S = 0.002
"""Batches that take less run in the event loop's thread, which spares each the switch to another and back."""
_INLINE_BYTES = 64 * 1024
"""Bodies up to this size are opened in the event loop's thread: a header of nothing but parts takes 20 ms."""
_INLINE_PIXELS = 256 * 256
"""Pictures up to this size are decoded in the event loop's thread, in about a millisecond at most."""


@dataclass(frozen=True)
class Loaded:
    """A model version in memory, ready to answer."""

    model: str
    version: int
    net: nn.Module
    package: ModelPackage

    @property
    def name(self) -> str:
        """``digits@3``."""
        return f"{self.model}@{self.version}"


class Endpoint:
    """How one app reads requests and words answers. Override `from_picture` or `from_json`, and `answer`.

    ``POST /predict`` takes a PNG or JPEG picture (raw, or a form's ``file``) or JSON, turns it into one
    sample with `from_picture` or `from_json`, stacks the samples of waiting requests, runs the model once and
    sends each caller its row of `answer`.
    """

    num_cpus: ClassVar[float] = 1.0
    """CPUs that the cluster sets aside for each replica; torch uses that many threads."""
    examples: ClassVar[Mapping[str, Any]] = {}
    """Example JSON requests by name, for the API's documentation page."""

    def from_picture(self, image: Image) -> NDArray[np.float32]:
        """One sample of an uploaded picture, as the model was trained on it.

        Called with the picture's header read and its size within bounds; `shoal.serve.to_grey` decodes it.
        """
        raise Refusal(415, "content_type", "This app does not read pictures.", "Send application/json.")

    def from_json(self, document: Any) -> NDArray[np.float32]:
        """One sample of a JSON request. Raise `Refusal` with status 422 for what does not fit."""
        raise Refusal(415, "content_type", "This app does not read JSON.", "Send a PNG or JPEG picture.")

    def answer(self, outputs: Tensor) -> Sequence[Mapping[str, Any]]:
        """What each row of the model's ``outputs`` (a batch) says, as JSON-able mappings, one per row."""
        raise NotImplementedError

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        keys: Keys | None = None,
        batch_size: int = 32,
        batch_wait_s: float = 0.0,
    ) -> None:
        self._limits = limits or Limits()
        self._keys = keys
        self._loading = threading.Lock()
        self._loaded: Loaded | None = None
        self._rejected: str | None = None
        self._batch_s = 1.0
        self.meter = Meter()
        # One thread each: a second forward or picture at once would take the CPU from the first.
        self._forward_thread = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._picture_thread = ThreadPoolExecutor(1, thread_name_prefix="picture")
        self._batcher: Batcher[NDArray[np.float32], Answer] = Batcher(
            self._forward,
            max_size=batch_size,
            max_wait_s=batch_wait_s,
            executor=self._forward_thread,
            num_by_size=self.meter.num_batches,
        )

    @classmethod
    def reads_pictures(cls) -> bool:
        """Whether a subclass says how a picture becomes a sample."""
        return cls.from_picture is not Endpoint.from_picture

    @classmethod
    def reads_json(cls) -> bool:
        """Whether a subclass says how JSON becomes a sample."""
        return cls.from_json is not Endpoint.from_json

    @property
    def loaded(self) -> Loaded | None:
        """The version that answers now; None before the first `load`."""
        return self._loaded

    def load(self, path: Path, *, expect: tuple[str, int] | None = None) -> Loaded:
        """Verify and load the model package at ``path``, then let it answer from the next batch on.

        Blocks for as long as loading takes; call it off the event loop. Until it returns, and if it raises,
        the version before goes on answering. ``expect`` is the (model, version) that the package must hold.
        Loads run one after the other.

        Raises:
            CorruptError: the package does not verify, or holds another version than expected.
            StorageError: it cannot be read.
        """
        with self._loading:  # else one that takes longer would replace what was asked for later
            return self._load(path, expect)

    def _load(self, path: Path, expect: tuple[str, int] | None) -> Loaded:
        from shoal.models import ModelPackage

        try:
            package = ModelPackage.open(path, expect=f"{expect[0]}@{expect[1]}" if expect else None)
            loaded = Loaded(package.model, package.version, package.load(), package)
        except Exception as error:  # of the recipe's own code too
            self._rejected = str(error) or type(error).__name__
            raise
        self._loaded = loaded
        self._rejected = None
        self._batcher.executor = self._forward_thread  # until this model's batches have been timed
        self._batch_s = 1.0
        return loaded

    def check_health(self) -> None:
        """Pass if a model is loaded.

        Raises:
            ClusterError: none is; says why.
        """
        if self._loaded is None:
            raise ClusterError(f"no model is loaded: {self._rejected or 'none was named'}")

    def asgi(self) -> Gate:
        """The ASGI app: the gate, the hot route behind it, and FastAPI for all others."""
        from shoal.serve.routes import build_routes

        return Gate(
            build_routes(self),
            hot={("POST", "/predict"): self.predict},
            limits=self._limits,
            version=self.version,
            keys=self._keys,
            meter=self.meter,
        )

    async def predict(self, call: Call) -> Answer:
        """Answer one request with the loaded model."""
        if self._loaded is None:
            raise no_model()
        return await self._batcher.submit(await self._sample(call))

    def describe(self) -> dict[str, Any]:
        """The model that answers now, where it comes from, and whether a later one was rejected."""
        loaded = self._loaded
        if loaded is None:
            raise no_model()
        return {
            "model": loaded.model,
            "version": loaded.version,
            "recipe": loaded.package.lineage.recipe,
            "lineage": _as_json(loaded.package.lineage),
            "rejected": self._rejected is not None,
        }

    async def _sample(self, call: Call) -> NDArray[np.float32]:
        media_type = upload.media_type(call.content_type)
        if media_type == upload.JSON:
            return self.from_json(upload.parse_json(call.body))
        if media_type in upload.PICTURES:
            return await self._sample_of_picture(call.body)
        if media_type == upload.FORM:
            return await self._sample_of_picture(await upload.file_in_form(call.body, call.content_type))
        raise upload.unsupported(call.content_type)

    async def _sample_of_picture(self, data: bytes) -> NDArray[np.float32]:
        loop = asyncio.get_running_loop()
        if len(data) > _INLINE_BYTES:
            return await loop.run_in_executor(
                self._picture_thread, lambda: self.from_picture(picture.open_picture(data))
            )
        image = picture.open_picture(data)
        if image.width * image.height <= _INLINE_PIXELS:
            return self.from_picture(image)
        return await loop.run_in_executor(self._picture_thread, self.from_picture, image)

    def _forward(self, samples: Sequence[NDArray[np.float32]]) -> list[Answer]:
        import numpy as np
        import torch
        from pydantic_core import to_json

        loaded = self._loaded  # once: a swap during the batch must not mix two versions
        assert loaded is not None, "predict lets nothing through before a model is loaded"
        started = perf_counter()
        with torch.inference_mode():
            rows = self.answer(loaded.net(torch.from_numpy(np.stack(samples))))
        self._choose_thread(perf_counter() - started)
        named = {"model": loaded.model, "version": loaded.version}
        version = loaded.name.encode()
        # JSON has no NaN: what is no number is null there.
        return [Answer(to_json({**row, **named}, inf_nan_mode="null"), version=version) for row in rows]

    def _choose_thread(self, seconds: float) -> None:
        """Run the next batches where they cost least, by the moving average of what batches took."""
        self._batch_s += 0.2 * (min(seconds, 1.0) - self._batch_s)
        self._batcher.executor = None if self._batch_s < _INLINE_BELOW_S else self._forward_thread

    def version(self) -> bytes:
        """The version that answers now, as it is in ``X-Model-Version``: ``digits@3``, or ``none``."""
        return b"none" if self._loaded is None else self._loaded.name.encode()


def _as_json(value: Any) -> Any:
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value)
