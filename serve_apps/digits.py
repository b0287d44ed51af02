"""Which digit is this? Draw one, send the picture.

shoal serve serve_apps.digits:app --model digits@champion
serve deploy serve_apps/digits.yaml
curl -F file=@seven.png http://127.0.0.1:8000/predict
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import PIL.Image

from shoal.serve import Endpoint, Refusal, app, read_pixels, to_grey

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SIDE = 8
"""The model's grid. scikit-learn's digits are 8 x 8 values from 0 (paper) to 16, trained on as 0..1."""


class Digits(Endpoint):
    """Says which handwritten digit a picture shows.

    Send a PNG or JPEG of any size, dark ink on light paper or the other way round, or 8 x 8 pixels as JSON:
    0 is paper, 16 is ink.
    """

    examples: ClassVar[Mapping[str, Any]] = {"a one": {"pixels": [[0, 0, 0, 8, 14, 0, 0, 0]] * SIDE}}

    def from_picture(self, image: PIL.Image.Image) -> NDArray[np.float32]:
        return _fit(_ink(to_grey(image, max_side=32 * SIDE)))

    def from_json(self, document: Any) -> NDArray[np.float32]:
        return read_pixels(document, shape=(SIDE, SIDE), low=0, high=16) / np.float32(16)

    def answer(self, outputs: Tensor) -> Sequence[Mapping[str, Any]]:
        probabilities = outputs.softmax(dim=1)
        return [{"class": row.index(max(row)), "probabilities": row} for row in probabilities.tolist()]


app = app(Digits)


def _ink(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much ink there is, 0 to 1. The border is paper, be it light or dark."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    paper = np.sort(border)[len(border) // 2]
    ink = (paper - grey if paper > 0.5 else grey - paper).clip(0, 1)
    if ink.max() < 0.1:
        raise Refusal(422, "no_ink", "The picture is blank.", "Draw a digit that stands out from its paper.")
    return ink / ink.max()


def _fit(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """The digit as the data set holds it: as tall as the grid, in the middle, each value the ink in its cell.

    A square picture that the digit already fills is only shrunk: cropping the data set's own digits anew
    costs two points of accuracy.
    """
    rows, columns = (np.flatnonzero((ink > 0.25).any(axis=axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = ink.shape
    if height != width or bottom - top < 0.7 * height:
        digit = ink[top:bottom, left:right]
        side = max(digit.shape)
        above, before = ((side - length) // 2 for length in digit.shape)
        ink = np.zeros((side, side), np.float32)
        ink[above : above + digit.shape[0], before : before + digit.shape[1]] = digit
    cells = np.asarray(PIL.Image.fromarray(ink).resize((SIDE, SIDE), PIL.Image.Resampling.BOX))
    return cells / cells.max()
