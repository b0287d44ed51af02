"""What a replica counted reaches Prometheus: the arithmetic here, the rest on a cluster in test_deploying."""

from __future__ import annotations

import pytest

from shoal.serve.exported import cumulative


@pytest.mark.parametrize(
    ("num_by_size", "largest", "expected"),
    [
        ({}, 4, {}),
        ({1: 5}, 1, {"1": 5, "+Inf": 5}),
        ({1: 5, 3: 2, 4: 1}, 4, {"1": 5, "2": 5, "4": 8, "+Inf": 8}),
        ({6: 1}, 6, {"8": 1, "+Inf": 1}),
    ],
)
def test_batches_are_counted_as_a_prometheus_histogram(
    num_by_size: dict[int, int], largest: int, expected: dict[str, int]
) -> None:
    assert cumulative(num_by_size, largest) == expected
