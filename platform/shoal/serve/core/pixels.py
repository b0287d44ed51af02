"""Pictures as numbers in JSON, read without trusting one of them."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from shoal.serve.core.answer import Refusal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NUMBERS = frozenset((int, float))


def read_pixels(document: Any, *, shape: tuple[int, ...], low: float, high: float) -> NDArray[np.float32]:
    """The array under ``pixels`` in a JSON document.

    Raises:
        Refusal: 422 if it is missing, not numbers, of another shape, not finite, or outside [low, high].
    """
    import numpy as np

    wanted = f"{' x '.join(map(str, shape))} numbers from {low:g} to {high:g}"
    hint = f'Send {{"pixels": [[...], ...]}} with {wanted}.'
    if not isinstance(document, dict) or document.keys() != {"pixels"}:
        raise Refusal(422, "pixels_missing", "The JSON is not an object with the one key 'pixels'.", hint)
    # Before numpy sees it: of mixed values it makes text as wide as the widest, gigabytes for a small document.
    values = [document["pixels"]]
    for length in shape:
        for value in values:
            if type(value) is not list or len(value) != length:
                raise _misfit(value, f"a list of {length}", hint)
        values = list(chain.from_iterable(values))
    if not _NUMBERS.issuperset(map(type, values)):  # True is an int and none of these
        raise _misfit(next(value for value in values if type(value) not in _NUMBERS), "a number", hint)
    try:
        pixels = np.array(values, dtype=np.float64)
    except OverflowError:  # an integer of hundreds of digits
        pixels = np.array(np.nan)
    # One comparison that NaN fails as well.
    if not (pixels.min() >= low and pixels.max() <= high):
        raise Refusal(
            422, "pixels_range", f"'pixels' holds NaN or a value outside {low:g} to {high:g}.", hint
        )
    return pixels.astype(np.float32).reshape(shape)


def _misfit(found: Any, wanted: str, hint: str) -> Refusal:
    if type(found) is list:
        return Refusal(422, "pixels_shape", f"'pixels' holds a list of {len(found)}, not {wanted}.", hint)
    if type(found) in _NUMBERS:
        return Refusal(422, "pixels_shape", f"'pixels' holds a number, not {wanted}.", hint)
    return Refusal(422, "pixels_type", "'pixels' holds something that is not a number.", hint)
