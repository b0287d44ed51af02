"""Uploaded pictures: PNG or JPEG of any size and mode, read without trusting a byte of them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from shoal.serve.core.answer import Refusal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

MAX_PIXELS = 32_000_000
"""Larger pictures are refused from their header, before a pixel is decoded. Phones take 12 to 24 million."""

MAX_READS = 50_000
"""Pillow's readers take a few reads per chunk or segment, in Python: a header made of nothing else would keep one
busy for seconds. An 8 MiB PNG in chunks of 8 KiB takes 6,000; 50,000 take 0.1 s."""

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_HINT = "Send a PNG or JPEG picture."


class _BoundedReads(io.BytesIO):
    _left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise OSError(f"the picture took more than {MAX_READS} reads")
        return super().read(size)


def open_picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image:
    """The picture's header; its pixels are decoded by `to_grey`. Takes 0.1 s at most, for data of any size.

    Raises:
        Refusal: 400 for no bytes, or a header that is broken or in too many parts (see `MAX_READS`), 415 for
            anything but PNG and JPEG, 413 for more than ``max_pixels``.
    """
    from PIL import Image

    if not data:
        raise Refusal(400, "body_empty", "The request holds no picture: its body is empty.", _HINT)
    if not data.startswith(_SIGNATURES):
        raise Refusal(415, "not_a_picture", "The upload is neither PNG nor JPEG.", _HINT)
    try:
        picture = Image.open(_BoundedReads(data), formats=("PNG", "JPEG"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(max_pixels) from None
    except (
        Exception
    ):  # Pillow's readers raise whatever the bytes provoke: OSError, SyntaxError, struct.error, ...
        raise _unreadable() from None
    if picture.width * picture.height > max_pixels:
        raise _too_many_pixels(max_pixels)
    return picture


def to_grey(picture: Image, *, max_side: int | None = None) -> NDArray[np.float32]:
    """The picture's brightness, height x width, 0 (black) to 1 (white); decodes it.

    Transparent parts are white, as on paper; 16-bit values keep their scale; a photograph is turned the way
    its EXIF data says. A picture with a side longer than ``max_side`` is shrunk to it, in proportion.

    Raises:
        Refusal: 400 if the picture is truncated or broken.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        if max_side is not None:
            picture.draft("L", (max_side, max_side))  # a JPEG is then decoded at a fraction of its size
        picture.load()
        grey = _grey(picture)
        if "exif" in picture.info:
            grey = ImageOps.exif_transpose(grey)
        if max_side is not None:
            grey.thumbnail((max_side, max_side), Image.Resampling.BOX)
        return np.asarray(grey, dtype=np.float32) / np.float32(1.0 if grey.mode == "F" else 255.0)
    except Exception:  # Pillow raises whatever the bytes provoke, see `open_picture`
        raise _unreadable() from None


def _grey(picture: Image) -> Image:
    """In mode L, or in mode F from 0 to 1 for what has more than 8 bits."""
    import numpy as np
    from PIL import Image

    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        # Pillow's own conversion to L clips at 255.
        return Image.fromarray(np.clip(np.asarray(picture, dtype=np.float32) / 65535.0, 0.0, 1.0))
    if not picture.has_transparency_data:
        return picture.convert("L")
    layered = picture.convert("RGBA")
    paper = Image.new("RGBA", layered.size, "white")
    paper.alpha_composite(layered)
    return paper.convert("L")


def _unreadable() -> Refusal:
    return Refusal(400, "picture_unreadable", "The picture is truncated or broken.", _HINT)


def _too_many_pixels(max_pixels: int) -> Refusal:
    return Refusal(
        413,
        "too_many_pixels",
        f"The picture has more than {max_pixels} pixels.",
        "Scale it down before sending it.",
    )
