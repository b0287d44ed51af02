"""Which class does this point belong to?

shoal serve serve_apps.my_task:app --model my_task@champion
serve deploy serve_apps/my_task.yaml
curl -H 'Content-Type: application/json' -d '{"features": [0.0, 1.0]}' http://127.0.0.1:8000/predict
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from shoal import serve

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

NUM_FEATURES = 2
MAX_FEATURE = 100.0
"""Far outside of what the model was trained on; a larger number is a caller's mistake."""


class MyTask(serve.Endpoint):
    """Says which of two classes a point belongs to, and how sure the model is of each.

    Send the numbers that the model was trained on, as ``{"features": [0.0, 1.0]}``.
    """

    examples: ClassVar[Mapping[str, Any]] = {
        "on the upper crescent": {"features": [0.0, 1.0]},
        "on the lower crescent": {"features": [1.0, -0.5]},
    }

    def from_json(self, document: Any) -> NDArray[np.float32]:
        """One sample of a request: the same numbers, in the same order, as `build_data` gives the model."""
        features = document.get("features") if isinstance(document, dict) else None
        if (
            not isinstance(features, list)
            or len(features) != NUM_FEATURES
            or not all(_is_feature(value) for value in features)
        ):
            raise serve.Refusal(
                422,
                "features",
                f"'features' is not a list of {NUM_FEATURES} numbers within {MAX_FEATURE:g} of 0.",
                'Send {"features": [0.0, 1.0]}.',
            )
        return np.array(features, dtype=np.float32)

    def answer(self, outputs: Tensor) -> Sequence[Mapping[str, Any]]:
        """What the caller reads: one mapping for each row of the model's outputs."""
        probabilities = outputs.softmax(dim=1)
        return [{"class": row.index(max(row)), "probabilities": row} for row in probabilities.tolist()]


app = serve.app(MyTask)


def _is_feature(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_FEATURE  # false for NaN, and for true and false
