"""Workers die of kill -9 at points drawn from a seed, and the run ends as if nothing had happened.

Every run of the tests draws another seed, and says it: ``SHOAL_FAULTS_SEED=<seed>`` draws the same scenarios again.
``make chaos`` plays all of them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from typing import get_args

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from faults.campaign import SHAPE, Campaign, Verdict
from faults.plan import Attempt, Fault, Point, Scenario, Scheduler, every_byte

SEED = int(os.environ.get("SHOAL_FAULTS_SEED") or secrets.randbelow(2**32))
SHARDS = 4
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    print(f"\nfaults drawn from SHOAL_FAULTS_SEED={SEED}")
    with Campaign(tmp_path_factory.mktemp("faults")) as campaign:
        yield campaign


def prove(campaign: Campaign, scenarios: list[Scenario]) -> list[Verdict]:
    verdicts = list(campaign.judge_all(scenarios))
    wrong = [f"{verdict.scenario}: {verdict.problems}" for verdict in verdicts if verdict.problems]
    assert not wrong, f"SHOAL_FAULTS_SEED={SEED}:\n" + "\n".join(wrong)
    return verdicts


@pytest.mark.parametrize(
    ("workers", "shards"),
    [
        (3, SHARDS),
        pytest.param(2, None, marks=pytest.mark.chaos),
        pytest.param(3, None, marks=pytest.mark.chaos),
    ],
)
def test_a_worker_dies_anywhere(campaign: Campaign, workers: int, shards: int | None) -> None:
    scheduler = Scheduler(SEED, campaign.size(workers, shards), SHARDS)
    exact = shards is not None
    drawn = [scheduler.one_death(workers=workers, exact=exact, point=point) for point in get_args(Point)]
    for verdict in prove(campaign, drawn):
        may_miss = verdict.scenario.attempts[0].faults[0].point == "bytes"  # its file may stay smaller
        assert verdict.deaths == 1 or may_miss, f"SHOAL_FAULTS_SEED={SEED}: {verdict.scenario} killed nobody"


@pytest.mark.chaos
@pytest.mark.parametrize("shards", [SHARDS, None])
def test_who_commits_for_the_dead_dies_too(campaign: Campaign, shards: int | None) -> None:
    scheduler = Scheduler(SEED, campaign.size(3, shards), SHARDS)
    verdicts = prove(
        campaign, [scheduler.rescuer_dies(workers=3, exact=shards is not None) for _ in range(3)]
    )
    assert all(verdict.deaths for verdict in verdicts)


def test_the_kernel_kills_at_a_byte_of_a_checkpoint(campaign: Campaign) -> None:
    offsets = list(every_byte(campaign.size(3, SHARDS), workers=3, shards=SHARDS, stride=64))
    stride = len(offsets) // 8
    verdicts = prove(campaign, offsets[SEED % stride :: stride])
    assert sum(verdict.deaths for verdict in verdicts) >= len(verdicts) // 2


@seed(SEED)
@settings(
    max_examples=6,
    deadline=None,
    database=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.generate),  # four numbers need no shrinking
    suppress_health_check=(HealthCheck.function_scoped_fixture, HealthCheck.too_slow),
)
@given(
    sizes=st.lists(st.integers(1, SHARDS), min_size=2, max_size=4),
    data=st.data(),
)
def test_an_exact_run_dies_and_goes_on_with_any_number_of_workers(
    campaign: Campaign, sizes: list[int], data: st.DataObject
) -> None:
    count = len(sizes) - 1
    steps = sorted(
        data.draw(st.lists(st.integers(0, SHAPE.steps - 1), min_size=count, max_size=count), label="steps")
    )
    deaths = zip(steps, sizes[:-1], sizes[1:], strict=True)
    attempts = tuple(
        Attempt((Fault(data.draw(st.integers(0, size - 1), label="rank"), "forward", step),), then)
        for step, size, then in deaths
    )
    (verdict,) = prove(campaign, [Scenario("resized", sizes[0], SHARDS, attempts)])
    assert verdict.deaths == count
