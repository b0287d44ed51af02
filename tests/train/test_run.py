"""A handle on a run whose failure was recorded: `wait` raises it as what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import ConfigError, PeerLost, Problem, RecipeError, RequestError, ShoalError
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from shoal.train.run import Run


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (PeerLost("a worker stopped answering"), PeerLost, "stopped answering"),
        (ConfigError([Problem("name", "too long")]), RequestError, "name: too long"),
        (ZeroDivisionError("by zero"), RecipeError, "full text: shoal logs broken"),
    ],
)
def test_a_recorded_failure_is_raised_as_what_it_was(
    tmp_path: Path, failure: Exception, kind: type[ShoalError], words: str
) -> None:
    record = RunRecord(Storage(tmp_path), "broken")
    record.claim_identity({"recipe": "a:B"})
    record.append("start", step=0, target_steps=5)
    record.append_end(RunState.FAILED, step=2, failure=failure, unknown=RecipeError)
    with pytest.raises(ShoalError, match=words) as raised:
        Run(record).wait(progress=False)
    assert type(raised.value) is kind
    assert str(raised.value).startswith("run 'broken' failed at step 2: ")
