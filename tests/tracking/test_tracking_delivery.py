"""What MLflow is told: planning only."""

from __future__ import annotations

import pytest

from shoal.tracking.delivery import (
    MAX_METRICS,
    MAX_PARAMS,
    Batch,
    clean_key,
    experiment_name,
    plan_metrics,
    plan_params,
    plan_tags,
    start_tags,
)


def line(step, t=1.0, kind="metrics", **values):
    return {"kind": kind, "t": t, "step": step, "split": "val", "values": values}


def test_metrics_are_split_at_the_limit_and_keep_their_order():
    events = [line(step, t=step / 10, loss=float(step), lr=0.1) for step in range(1001)]
    batches = plan_metrics(events)
    assert [len(batch) for batch in batches] == [MAX_METRICS, MAX_METRICS, 2]
    points = [point for batch in batches for point in batch.metrics]
    assert [point.step for point in points if point.key == "loss"] == list(range(1001))
    assert points[6] == ("loss", 3.0, 300, 3)


def test_only_metrics_and_evaluations_are_metrics():
    events = [line(1, loss=1.0), line(1, kind="eval", loss=2.0), line(1, kind="checkpoint", loss=3.0)]
    (batch,) = plan_metrics(events)
    assert [(point.key, point.value) for point in batch.metrics] == [("loss", 1.0), ("val_loss", 2.0)]
    assert plan_metrics([]) == []


def test_params_are_the_fields_and_the_rest_of_the_identity():
    identity = {"recipe": "jobs.d:D", "fields": {"lr": 0.1, "aug": {"flip": True}, "none": None}, "seed": 3}
    (batch,) = plan_params(identity)
    assert dict(batch.params) == {
        "lr": "0.1",
        "aug.flip": "true",
        "none": "null",
        "identity.recipe": "jobs.d:D",
        "identity.seed": "3",
    }
    many = plan_params({"fields": {f"f{n}": "x" * 9000 for n in range(150)}})
    assert [len(batch) for batch in many] == [MAX_PARAMS, 50]
    assert all(len(value) == 6000 for batch in many for _, value in batch.params)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("loss", "loss"),
        ("grad norm/l2", "grad norm/l2"),
        ("a@b", "a_b"),
        ("../up", "___up"),
        ("a//b", "a__b"),
        ("/abs", "_abs"),
        (".", "_"),
        ("", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_keys_are_made_legal(name, key):
    assert clean_key(name) == key


def test_experiment_is_the_sweep_or_the_recipe():
    assert experiment_name({"recipe": "jobs.digits:Digits"}) == "Digits"
    assert experiment_name({"recipe": "jobs.digits:Digits"}, sweep="digits-sweep") == "digits-sweep"
    assert experiment_name({}) == "shoal"


def test_text_that_no_store_can_encode_is_made_legal():
    odd = "caf\udce9"  # how Python shows a byte of the command line that is not UTF-8
    (params,) = plan_params({"fields": {"note": odd}})
    (tags,) = plan_tags({"shoal.recipe": odd})
    assert params.params == (("note", "caf?"),)
    assert tags.tags == (("shoal.recipe", "caf?"),)
    assert experiment_name({"recipe": f"jobs.x:{odd}"}) == "caf?"
    assert clean_key(odd) == "caf_"


def test_start_tags_leave_out_what_is_not_known():
    assert start_tags({"kind": "start", "workers": 2, "host": "", "attempt": 1}) == {
        "shoal.attempt": "1",
        "shoal.workers": "2",
    }
    assert plan_tags({}) == []


def test_halves_say_together_what_the_whole_says():
    (batch,) = plan_metrics([line(step, loss=0.0) for step in range(7)])
    first, second = batch.halves()
    assert first.metrics + second.metrics == batch.metrics
    assert (len(first), len(second)) == (3, 4)
    assert [len(half) for half in Batch(params=(("a", "1"), ("b", "2"))).halves()] == [1, 1]
