"""Uploads: every size and mode of picture is read, everything else is refused with the right status."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shoal.serve.core import upload
from shoal.serve.core.answer import Refusal
from shoal.serve.core.picture import open_picture, to_grey
from shoal.serve.core.pixels import read_pixels

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"]


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str, size: tuple[int, int], brightness: int) -> Image.Image:
    """One shade of grey, 0 to 255, in any mode."""
    grey = Image.new("L", size, brightness)
    if mode == "I;16":
        return Image.fromarray(np.full(size[::-1], brightness * 257, np.uint16))
    return grey.convert("RGB").convert(mode) if mode in ("P", "CMYK") else grey.convert(mode)


def grey(data: bytes, **options: Any) -> Any:
    return to_grey(open_picture(data), **options)


def outcome(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or the refusal it raises; any other exception is a failure."""
    try:
        return call()
    except Refusal as refused:
        return refused


def refusal(data: bytes, **options: Any) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        to_grey(open_picture(data, **options))
    return caught.value.status, caught.value.code


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (3, 200), (300, 100)])
@pytest.mark.parametrize("brightness", [0, 255])
def test_every_mode_and_size_keeps_its_brightness(mode: str, size: tuple[int, int], brightness: int) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    for options in ({}, {"max_side": 64}):
        pixels = grey(encode(picture(mode, size, brightness), kind), **options)
        assert pixels.dtype == np.float32
        assert pixels == pytest.approx(brightness / 255, abs=0.02)


def test_16_bit_values_keep_their_scale() -> None:
    assert grey(encode(picture("I;16", (4, 4), 128))) == pytest.approx(128 / 255, abs=0.01)


def test_transparent_is_white() -> None:
    assert grey(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))) == pytest.approx(1.0)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0] * 256)
    assert grey(encode(palette, transparency=0)) == pytest.approx(1.0)


def test_a_photograph_is_turned_upright() -> None:
    image = Image.new("L", (20, 10), 255)
    image.paste(0, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = grey(encode(image, "JPEG", exif=exif))
    assert turned.shape == (20, 10)
    assert turned[:8].mean() < 0.1 < 0.9 < turned[12:].mean()


def test_a_long_picture_is_shrunk_in_proportion() -> None:
    assert grey(encode(Image.new("L", (4000, 2))), max_side=100).shape == (1, 100)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it has this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 10**6))
    )


@pytest.mark.parametrize("size", [(6000, 6000), (10000, 10000), (30000, 30000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert refusal(bomb(*size)) == (413, "too_many_pixels")


def test_the_bound_on_pixels_counts_pixels() -> None:
    data = encode(Image.new("L", (10, 10)))
    assert refusal(data, max_pixels=99) == (413, "too_many_pixels")
    assert grey(data).shape == (10, 10)
    open_picture(data, max_pixels=100)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"])
def test_other_kinds_of_picture_are_refused(kind: str) -> None:
    assert refusal(encode(Image.new("RGB", (16, 16)), kind)) == (415, "not_a_picture")


def test_what_is_no_picture() -> None:
    assert refusal(b"") == (400, "body_empty")
    assert refusal(b"%PDF-1.4 hello") == (415, "not_a_picture")
    assert refusal(b"\x89PNG\r\n\x1a\n") == (400, "picture_unreadable")
    assert refusal(b"\xff\xd8\xff") == (400, "picture_unreadable")


PNG_HEADER = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
PNG_PIXELS = png_chunk(b"IDAT", zlib.compress(b"\0" * 72))
PNG_PARTS = png_chunk(b"teSt", b"") * 690_000  # 8 MB, the most that an app takes by default


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n" + PNG_HEADER + PNG_PARTS + PNG_PIXELS,
        b"\x89PNG\r\n\x1a\n" + PNG_HEADER + PNG_PIXELS + PNG_PARTS,
        b"\xff\xd8" + b"\xff\xe1\x00\x02" * 2_000_000,
        b"\xff\xd8\xff" + b"\xff" * 8_000_000,
    ],
    ids=["PNG chunks before", "PNG chunks after", "JPEG segments", "JPEG padding"],
)
def test_a_picture_in_too_many_parts_is_refused_before_they_are_read(data: bytes) -> None:
    started = time.process_time()
    assert refusal(data) == (400, "picture_unreadable")
    assert time.process_time() - started < 1.0  # seconds of CPU; all parts take 3 and more


def test_a_picture_of_many_honest_parts_is_read() -> None:
    pixels = zlib.compress(b"\0" * 72, level=0)
    parts = b"".join(png_chunk(b"IDAT", pixels[i : i + 1]) for i in range(len(pixels)))
    data = (
        b"\x89PNG\r\n\x1a\n" + PNG_HEADER + png_chunk(b"teSt", b"x") * 5_000 + parts + png_chunk(b"IEND", b"")
    )
    assert grey(data).shape == (8, 8)


GOOD = {kind: encode(Image.effect_noise((24, 24), 80).convert("RGB"), kind) for kind in ("PNG", "JPEG")}


@pytest.mark.parametrize("kind", GOOD)
def test_every_truncation_is_refused(kind: str) -> None:
    data = GOOD[kind]
    # The last bytes hold no pixels: checksums and IEND in a PNG (20), the end mark in a JPEG (2).
    for length in range(1, len(data) - 20, 7):
        assert refusal(data[:length]) in {(400, "picture_unreadable"), (415, "not_a_picture")}


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG"]),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 10_000),
    tail=st.binary(max_size=30),
)
def test_damaged_pictures_are_read_or_refused(
    kind: str, edits: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    data = bytearray(GOOD[kind])
    for position, value in edits:
        data[position % len(data)] = value
    if cut < len(data):
        del data[cut:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata
        found = outcome(lambda: to_grey(open_picture(bytes(data) + tail), max_side=64))
    if isinstance(found, Refusal):
        assert found.status in (400, 413, 415)
    else:
        assert found.ndim == 2
        assert np.isfinite(found).all()


ROW = [0] * 8


def pixels(document: Any) -> Any:
    return read_pixels(document, shape=(8, 8), low=0, high=16)


def test_pixels_as_json() -> None:
    found = pixels({"pixels": [[0, 16, 3.5, 0, 0, 0, 0, 1], *[ROW] * 7]})
    assert found.dtype == np.float32
    assert found[0, :3].tolist() == [0, 16, 3.5]


@pytest.mark.parametrize(
    ("document", "code"),
    [
        ([[0]], "pixels_missing"),
        (None, "pixels_missing"),
        ({}, "pixels_missing"),
        ({"pixels": [ROW] * 8, "more": 1}, "pixels_missing"),
        ({"pixels": [ROW] * 7}, "pixels_shape"),
        ({"pixels": ROW}, "pixels_shape"),
        ({"pixels": [[ROW] * 8]}, "pixels_shape"),
        ({"pixels": 3}, "pixels_shape"),
        ({"pixels": []}, "pixels_shape"),
        ({"pixels": [ROW] * 7 + [ROW[:7]]}, "pixels_shape"),
        ({"pixels": [["7"] * 8] * 8}, "pixels_type"),
        ({"pixels": [[True] * 8] * 8}, "pixels_type"),
        ({"pixels": [[None] * 8] * 8}, "pixels_type"),
        ({"pixels": "x"}, "pixels_type"),
        ({"pixels": [[10**30] * 8] * 8}, "pixels_range"),
        ({"pixels": [[10**999] * 8] * 8}, "pixels_range"),
        ({"pixels": [[17, *ROW[1:]], *[ROW] * 7]}, "pixels_range"),
        ({"pixels": [[-1, *ROW[1:]], *[ROW] * 7]}, "pixels_range"),
        ({"pixels": [[float("nan"), *ROW[1:]], *[ROW] * 7]}, "pixels_range"),
        ({"pixels": [[float("inf"), *ROW[1:]], *[ROW] * 7]}, "pixels_range"),
    ],
)
def test_wrong_pixels(document: Any, code: str) -> None:
    with pytest.raises(Refusal) as caught:
        pixels(document)
    assert (caught.value.status, caught.value.code) == (422, code)


def test_a_long_text_among_numbers_takes_no_more_memory_than_it_has() -> None:
    document = {"pixels": ["a" * 30_000, *[0] * 8_000]}  # numpy makes 8,001 texts of 30,000 characters of it
    tracemalloc.start()
    try:
        with pytest.raises(Refusal):
            pixels(document)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=40,
)


@settings(max_examples=300, deadline=None)
@given(VALUES | st.fixed_dictionaries({"pixels": VALUES}))
def test_any_json_is_read_or_refused(document: Any) -> None:
    found = outcome(lambda: pixels(upload.parse_json(json.dumps(document).encode())))
    assert found.status == 422 if isinstance(found, Refusal) else found.shape == (8, 8)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_json_are_read_or_refused(body: bytes) -> None:
    found = outcome(lambda: upload.parse_json(body))
    assert not isinstance(found, Refusal) or found.status == 400


def test_deep_json_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        upload.parse_json(b"[" * 100_000)
    assert caught.value.status == 400


def form(name: str, data: bytes, boundary: str = "b") -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="x.png"\r\n\r\n'
    return head.encode() + data + f"\r\n--{boundary}--\r\n".encode()


FORM = "multipart/form-data; boundary=b"


def test_file_in_form() -> None:
    assert asyncio.run(upload.file_in_form(form("file", b"\x00data"), FORM)) == b"\x00data"


@pytest.mark.parametrize(
    ("body", "content_type", "code"),
    [
        (form("picture", b"x"), FORM, "file_missing"),
        (
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--b--\r\n',
            FORM,
            "file_missing",
        ),
        (b"", FORM, "file_missing"),
        (form("file", b"x"), "multipart/form-data", "bad_form"),
        (b"--b\r\nnonsense\r\n\r\n", FORM, "bad_form"),
    ],
)
def test_wrong_forms(body: bytes, content_type: str, code: str) -> None:
    with pytest.raises(Refusal) as caught:
        asyncio.run(upload.file_in_form(body, content_type))
    assert (caught.value.status, caught.value.code) == (400, code)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from([FORM, "multipart/form-data; boundary=", "multipart/form-data;;"]),
)
def test_any_bytes_as_form_are_read_or_refused(body: bytes, content_type: str) -> None:
    found = outcome(lambda: asyncio.run(upload.file_in_form(b"--b\r\n" + body, content_type)))
    assert not isinstance(found, Refusal) or found.status == 400
