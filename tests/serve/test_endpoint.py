"""The digits app without a server: pictures and pixels in, classes out, versions swapped."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import math
import shlex
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asgi_harness import ask, get, post
from PIL import Image

from jobs.digits import Digits as DigitsRecipe
from serve_apps.digits import Digits
from shoal.errors import ClusterError, CorruptError
from shoal.models import Lineage, ModelPackage, write_package
from shoal.serve.core import upload
from shoal.serve.core.answer import Refusal
from shoal.serve.core.gate import Limits
from shoal.serve.core.picture import open_picture
from shoal.serve.handle import curl_command

PIXELS = {"pixels": [[0, 0, 0, 8, 14, 0, 0, 0]] * 8}


def write_version_to(path: Path, model: str, version: int, *, always: int | None = None) -> None:
    """An untrained digits model; ``always`` makes it answer that class whatever it sees."""
    import torch

    recipe = DigitsRecipe(hidden=16)
    torch.manual_seed(version)
    net = recipe.build_model()
    if always is not None:
        with torch.no_grad():
            net[-1].weight.zero_()
            net[-1].bias.zero_()
            net[-1].bias[always] = 10.0
    lineage = Lineage(
        recipe="jobs.digits:Digits",
        fields={"hidden": 16},
        data_fingerprint="none",
        code_revision="",
        run="untrained",
        trial=None,
        checkpoint_step=0,
        metrics={},
        created=0.0,
    )
    write_package(path, net.state_dict(), model=model, version=version, lineage=lineage)


def write_version(directory: Path, version: int, *, always: int | None = None) -> Path:
    """As `write_version_to`, in a folder of its own."""
    path = directory / str(version)
    write_version_to(path, "digits", version, always=always)
    return path


@pytest.fixture
def endpoint(tmp_path: Path) -> Digits:
    made = Digits(limits=Limits(max_body_bytes=100_000))
    made.load(write_version(tmp_path, 1, always=3))
    return made


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def drawn(size: tuple[int, int] = (200, 120), mode: str = "L") -> Image.Image:
    image = Image.new("L", size, 250)
    image.paste(20, (size[0] // 2, 10, size[0] // 2 + 9, size[1] - 10))
    return image.convert(mode)


def test_a_long_upload_is_opened_outside_the_event_loop(
    endpoint: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def opened(data: bytes) -> Image.Image:
        threads.append(threading.current_thread().name.partition("_")[0])
        return open_picture(data)

    monkeypatch.setattr("shoal.serve.core.picture.open_picture", opened)
    short = png(drawn())
    for body in (short, short + bytes(70_000)):
        assert post(endpoint.asgi(), body, "image/png").status == 200
    assert threads == [threading.current_thread().name.partition("_")[0], "picture"]


def form(data: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.png"\r\n\r\n'
    return head + data + b"\r\n--b--\r\n"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (json.dumps(PIXELS).encode(), "application/json"),
        (json.dumps(PIXELS).encode(), "Application/JSON; charset=utf-8"),
        (png(drawn()), "image/png"),
        (png(drawn(mode="RGBA")), "image/png"),
        (png(drawn(mode="RGB"), "JPEG"), "image/jpeg"),
        (png(drawn((900, 700))), "image/png"),  # large: decoded in the other thread
        (form(png(drawn())), "multipart/form-data; boundary=b"),
    ],
)
def test_predict(endpoint: Digits, body: bytes, content_type: str) -> None:
    got = post(endpoint.asgi(), body, content_type)
    assert got.status == 200, got.body
    answer = got.json
    assert answer.keys() == {"class", "probabilities", "model", "version"}
    assert (answer["class"], answer["model"], answer["version"]) == (3, "digits", 1)
    assert len(answer["probabilities"]) == 10
    assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert got.headers["x-model-version"] == "digits@1"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"", "application/json", 400, "body_empty"),
        (b"{", "application/json", 400, "bad_json"),
        (b'{"pixels": [[NaN]]}', "application/json", 422, "pixels_shape"),
        (json.dumps({"pixels": [[float("nan")] * 8] * 8}).encode(), "application/json", 422, "pixels_range"),
        (b"", "image/png", 400, "body_empty"),
        (b"GIF89a", "image/png", 415, "not_a_picture"),
        (png(drawn())[:60], "image/png", 400, "picture_unreadable"),
        (png(Image.new("L", (50, 50), 255)), "image/png", 422, "no_ink"),
        (b"x=1", "application/x-www-form-urlencoded", 415, "content_type"),
        (b"x", "text/plain", 415, "content_type"),
        (b"x", None, 415, "content_type"),
        (b"x" * 100_001, "image/png", 413, "body_too_large"),
        (b"--b--", "multipart/form-data; boundary=b", 400, "file_missing"),
        (form(b"x"), "multipart/form-data; boundary=b; charset=undefined", 400, "bad_form"),
        (form(b"x"), "multipart/form-data; boundary=b; charset=\0", 400, "bad_form"),
    ],
)
def test_bad_requests(
    endpoint: Digits, body: bytes, content_type: str | None, status: int, code: str
) -> None:
    got = post(endpoint.asgi(), body, content_type)
    assert (got.status, got.code) == (status, code)
    assert got.headers["x-model-version"] == "digits@1"


def test_json_of_many_values_is_refused_unparsed(endpoint: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing holds up every other request: 8 MiB of empty lists took seconds."""
    monkeypatch.setattr(upload, "MAX_JSON_VALUES", 10)
    monkeypatch.setattr(upload, "_FEW_BYTES", 0)
    assert upload.parse_json(b"[" + b"0," * 8 + b"[]]") == [0] * 8 + [[]]
    monkeypatch.setattr("pydantic_core.from_json", lambda *_, **__: pytest.fail("parsed"))
    for body in (b"[" + b"0," * 10 + b"0]", b"[" * 11 + b"]" * 11, b'{"":' * 11 + b"0" + b"}" * 11):
        got = post(endpoint.asgi(), body, "application/json")
        assert (got.status, got.code) == (413, "too_many_values")


def test_the_collector_goes_on_after_json_good_or_bad() -> None:
    for body in (b"[]", b"["):
        with contextlib.suppress(Refusal):
            upload.parse_json(body)
        assert gc.isenabled()


def test_wrong_paths_and_methods(endpoint: Digits) -> None:
    app = endpoint.asgi()
    missing = get(app, "/nothing")
    assert (missing.status, missing.code) == (404, "not_found")
    wrong = get(app, "/predict")
    assert (wrong.status, wrong.code, wrong.headers["allow"]) == (405, "method_not_allowed", "POST")


def test_model_and_health(endpoint: Digits) -> None:
    app = endpoint.asgi()
    assert get(app, "/healthz").json == {"status": "ok", "model": "digits", "version": 1}
    model = get(app, "/model").json
    assert (model["model"], model["version"], model["recipe"]) == ("digits", 1, "jobs.digits:Digits")
    assert model["lineage"]["run"] == "untrained"
    assert model["rejected"] is False


def test_what_json_has_no_word_for_is_said_in_json(endpoint: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = endpoint.loaded
    assert loaded is not None
    lineage = replace(loaded.package.lineage, fields={"clip": math.inf}, metrics={"perplexity": math.nan})
    endpoint._loaded = replace(loaded, package=replace(loaded.package, lineage=lineage))
    model = get(endpoint.asgi(), "/model")
    assert model.status == 200
    assert model.json["lineage"]["fields"] == {"clip": "Infinity"}
    assert model.json["lineage"]["metrics"] == {"perplexity": "NaN"}
    monkeypatch.setattr(endpoint, "answer", lambda outputs: [{"score": math.nan}])
    got = post(endpoint.asgi(), json.dumps(PIXELS).encode(), "application/json")
    assert json.loads(got.body, parse_constant=pytest.fail)["score"] is None


def test_documentation_page(endpoint: Digits) -> None:
    app = endpoint.asgi()
    assert b"swagger" in get(app, "/docs").body.lower()
    spec = get(app, "/openapi.json").json
    body = spec["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert body.keys() == {"application/json", "multipart/form-data", "image/png", "image/jpeg"}
    assert {"200", "401", "403", "413", "415", "422", "503", "504"} <= spec["paths"]["/predict"]["post"][
        "responses"
    ].keys()
    assert {"/healthz", "/model"} <= spec["paths"].keys()


def test_the_page_and_the_hint_name_only_what_the_app_reads() -> None:
    from shoal.cli.template.serve_apps.my_task import MyTask

    spec = get(MyTask().asgi(), "/openapi.json").json
    content = spec["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert content.keys() == {"application/json"}
    words = shlex.split(curl_command("http://app/predict", content, has_keys=True))
    assert words[:5] == ["curl", "-H", "X-API-Key: KEY", "-H", "Content-Type: application/json"]
    assert MyTask().from_json(json.loads(words[words.index("-d") + 1])).shape == (2,)


def test_the_hint_for_an_app_that_reads_pictures_sends_one(endpoint: Digits) -> None:
    spec = get(endpoint.asgi(), "/openapi.json").json
    content = spec["paths"]["/predict"]["post"]["requestBody"]["content"]
    hint = curl_command("http://app/predict", content, has_keys=False)
    assert hint == "curl -F file=@picture.png http://app/predict"


def test_the_documented_example_is_accepted(endpoint: Digits) -> None:
    for example in Digits.examples.values():
        assert post(endpoint.asgi(), json.dumps(example).encode(), "application/json").status == 200


def test_before_a_model_is_loaded() -> None:
    empty = Digits()
    app = empty.asgi()
    for got in (get(app, "/healthz"), get(app, "/model"), post(app, b"{}", "application/json")):
        assert (got.status, got.code, got.headers["x-model-version"]) == (503, "no_model", "none")
    with pytest.raises(ClusterError, match="no model"):
        empty.check_health()


def test_swap_under_load_mixes_nothing_and_loses_nothing(endpoint: Digits, tmp_path: Path) -> None:
    second = write_version(tmp_path, 2, always=5)
    body = json.dumps(PIXELS).encode()

    async def main() -> list[tuple[str, int]]:
        app = endpoint.asgi()
        seen: list[tuple[str, int]] = []

        async def caller() -> None:
            while len(seen) < 400:
                got = await ask(app, body=body, headers={"content-type": "application/json"})
                assert got.status == 200
                seen.append((got.headers["x-model-version"], got.json["class"]))

        async def swap() -> None:
            while len(seen) < 100:
                await asyncio.sleep(0)
            await asyncio.to_thread(endpoint.load, second)

        await asyncio.gather(swap(), *(caller() for _ in range(8)))
        return [*seen, await last(app)]

    async def last(app: Any) -> tuple[str, int]:
        got = await ask(app, body=body, headers={"content-type": "application/json"})
        return got.headers["x-model-version"], got.json["class"]

    seen = asyncio.run(main())
    assert set(seen) == {("digits@1", 3), ("digits@2", 5)}
    assert seen[-1] == ("digits@2", 5)


def test_a_bad_package_leaves_the_version_before(endpoint: Digits, tmp_path: Path) -> None:
    second = write_version(tmp_path, 2)
    weights = bytearray((second / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (second / "model.safetensors").write_bytes(weights)
    with pytest.raises(CorruptError):
        endpoint.load(second)
    app = endpoint.asgi()
    model = get(app, "/model").json
    assert (model["version"], model["rejected"]) == (1, True)
    assert post(app, json.dumps(PIXELS).encode(), "application/json").json["version"] == 1
    endpoint.load(write_version(tmp_path, 3))
    assert get(app, "/model").json["rejected"] is False


def test_a_load_that_fails_in_a_recipes_code_is_a_rejection_too(
    endpoint: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, state: Any, strict: bool) -> None:
        raise KeyError("weight")

    second = write_version(tmp_path, 2)
    monkeypatch.setattr("torch.nn.Sequential.load_state_dict", fail)
    with pytest.raises(KeyError):
        endpoint.load(second)
    assert endpoint.describe()["rejected"] is True
    assert endpoint.describe()["version"] == 1


def test_a_load_that_takes_long_does_not_undo_a_later_one(
    endpoint: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = write_version(tmp_path, 2), write_version(tmp_path, 3)
    is_loading, later_is_done = threading.Event(), threading.Event()
    load = ModelPackage.load

    def slowly(package: ModelPackage) -> Any:
        if package.version == 2:
            is_loading.set()
            later_is_done.wait(0.2)  # a second one that is let in is done now
        return load(package)

    monkeypatch.setattr(ModelPackage, "load", slowly)
    first = threading.Thread(target=endpoint.load, args=[slow])
    first.start()
    assert is_loading.wait(30)
    endpoint.load(fast)
    later_is_done.set()
    first.join(30)
    assert endpoint.loaded is not None
    assert endpoint.loaded.version == 3


def test_a_package_of_another_model_is_refused(endpoint: Digits, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="digits@2, not digits@9"):
        endpoint.load(write_version(tmp_path, 2), expect=("digits", 9))
    assert endpoint.loaded is not None
    assert endpoint.loaded.version == 1


def test_waiting_requests_run_as_one_batch(endpoint: Digits) -> None:
    sizes: list[int] = []
    answer = endpoint.answer

    def spy(outputs: Any) -> Any:
        sizes.append(len(outputs))
        return answer(outputs)

    endpoint.answer = spy  # type: ignore[method-assign]
    body = json.dumps(PIXELS).encode()

    async def main() -> None:
        app = endpoint.asgi()
        await asyncio.gather(
            *(ask(app, body=body, headers={"content-type": "application/json"}) for _ in range(20))
        )

    asyncio.run(main())
    assert sizes == [20]


def test_fast_models_run_inline_and_slow_ones_do_not(endpoint: Digits) -> None:
    for _ in range(40):
        endpoint._choose_thread(0.0001)
    assert endpoint._batcher.executor is None
    for _ in range(10):
        endpoint._choose_thread(0.05)
    assert endpoint._batcher.executor is not None


@pytest.mark.parametrize("style", ["as it is", "inverted", "enlarged", "on grey paper", "off centre"])
def test_a_picture_becomes_what_the_data_set_holds(endpoint: Digits, style: str) -> None:
    """30 digits of the data set, drawn in five styles, come out close to their 8 x 8 original."""
    from sklearn.datasets import load_digits

    from shoal.serve.core.picture import open_picture

    errors = []
    for pixels in load_digits().images[:30]:
        small = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
        large = small.resize((160, 160), Image.Resampling.BICUBIC)
        image = {
            "as it is": small,
            "inverted": Image.eval(small, lambda value: 255 - value),
            "enlarged": large,
            "on grey paper": Image.eval(large, lambda value: 230 - value // 2),
            "off centre": _pasted(large),
        }[style]
        found = endpoint.from_picture(open_picture(png(image)))
        assert found.shape == (8, 8)
        assert found.dtype == np.float32
        errors.append(np.abs(found - pixels / 16).mean())
    # Enlarging blurs; cropping anew may shift a digit by part of a cell; a wrong polarity gives 0.3 and more.
    assert np.mean(errors) < {"as it is": 0.01, "inverted": 0.01, "off centre": 0.12}.get(style, 0.06)


def _pasted(digit: Image.Image) -> Image.Image:
    page = Image.new("L", (500, 400), 255)
    page.paste(Image.eval(digit, lambda value: 255 - value), (30, 200))
    return page
