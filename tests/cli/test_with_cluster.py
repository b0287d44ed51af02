"""A story on the shell, on the session's cluster: train, look, register, detach, stop."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from command_line import Shoal

from shoal.cluster import ClusterInfo
from shoal.errors import ClusterError, RequestError
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState

pytestmark = pytest.mark.cluster

PIXELS = {"pixels": [[0, 0, 0, 8, 14, 0, 0, 0]] * 8}


@pytest.fixture(autouse=True)
def in_project(cluster: ClusterInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cluster.project)


@pytest.fixture(scope="module")
def run_name() -> str:
    return "cli-story"


def test_env_is_read_by_a_shell(cluster: ClusterInfo, shoal: Shoal) -> None:
    script = shoal("env").out + 'printf \'%s %s\' "$RAY_ADDRESS" "$RAY_AUTH_TOKEN_PATH"'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env={}, timeout=30
    )
    assert done.stdout == f"{cluster.address} {cluster.token_path}"
    assert json.loads(shoal("env", "--json").out)["RAY_AUTH_MODE"] == "token"


def test_up_finds_the_cluster_that_runs(cluster: ClusterInfo, shoal: Shoal) -> None:
    outcome = shoal("up")
    assert outcome.code == 0, outcome.err
    assert f"is already up: {cluster.dashboard_url}" in outcome.out


def test_train_shows_progress_and_the_result(cluster: ClusterInfo, shoal: Shoal, run_name: str) -> None:
    outcome = shoal("train", "jobs.digits", "hidden=32", "--workers=2", "--steps=100", f"--name={run_name}")
    assert outcome.code == 0, outcome.err
    facts = dict(re.findall(r"^(\w+) {2,}(.*)$", outcome.out, re.M))
    assert facts["state"] == "finished"
    assert facts["steps"] == "100 of 100"
    assert "accuracy" in facts["test"]
    assert re.fullmatch(r"val accuracy 0\.\d+ at step \d+", facts["best"])
    assert facts["next"] == f"shoal register digits {run_name} --alias champion"
    again = shoal("train", "jobs.digits", "hidden=32", "--workers=1", "--steps=100", f"--name={run_name}")
    assert again.code == 0
    assert "nothing was trained" in again.out


def test_another_identity_of_the_same_name_is_refused(shoal: Shoal, run_name: str) -> None:
    outcome = shoal("train", "jobs.digits", "hidden=64", f"--name={run_name}")
    assert outcome.code == 2
    assert "fields.hidden: it has 32, you asked for 64" in outcome.err


def test_status_shows_the_run(cluster: ClusterInfo, shoal: Shoal, run_name: str) -> None:
    outcome = shoal("status")
    assert outcome.code == 0, outcome.err
    assert cluster.dashboard_url in outcome.out
    assert re.search(rf"^{run_name} +finished +100 +100 +accuracy", outcome.out, re.M)


def test_register_and_models_and_alias(shoal: Shoal, run_name: str) -> None:
    registered = shoal("register", "cli-digits", run_name, "--alias", "champion")
    assert registered.code == 0, registered.err
    assert re.search(r"^cli-digits +1 +1 +champion=1$", shoal("models").out, re.M)
    assert re.search(rf"^cli-digits@1 +champion +{run_name} ", shoal("models", "cli-digits").out, re.M)
    assert shoal("alias", "cli-digits", "next", "1").code == 0
    assert shoal("alias", "cli-digits", "next", "2").code == 2
    assert shoal("register", "cli-digits", "nobody").code == 2


def test_deleting_an_app_leaves_the_others_answering(cluster: ClusterInfo, shoal: Shoal) -> None:
    from shoal.serve import apps

    assert re.search(r"^no apps yet", shoal("apps").out, re.M)
    for model, near in (("cli-digits@champio", "champion"), ("cli-digts@champion", "cli-digits")):
        unknown = shoal("serve", "serve_apps.digits:app", f"--model={model}")
        assert (unknown.code, unknown.out) == (2, "")
        assert f"; did you mean {near}?" in unknown.err
    for name in ("cli-stays", "cli-goes"):
        outcome = shoal("serve", "serve_apps.digits:app", "--model=cli-digits@champion", f"--name={name}")
        assert outcome.code == 0, outcome.err
        url = re.search(r"^url +(\S+)$", outcome.out, re.M)
        assert url is not None
        assert re.search(rf"^try +curl -F file=@picture.png {url[1]}/predict$", outcome.out, re.M)
    goes, stays = apps(cluster)
    assert re.search(r"^cli-goes +RUNNING +cli-digits@1 ", shoal("apps").out, re.M)
    assert goes.predict(PIXELS)["version"] == 1

    deleted = shoal("delete", "cli-goes")
    assert deleted.code == 0, deleted.err
    assert deleted.out.endswith("\napp cli-goes is deleted\n")
    assert stays.predict(PIXELS)["version"] == 1
    with pytest.raises(RequestError, match="404"):
        goes.predict(PIXELS)
    assert [app.name for app in apps(cluster)] == ["cli-stays"]
    again = shoal("delete", "cli-goes")
    assert (again.code, again.out, again.err) == (
        2,
        "",
        "error: there is no app 'cli-goes'; running: cli-stays\n",
    )

    assert shoal("delete", "cli-stays").code == 0
    with pytest.raises((RequestError, ClusterError)):
        stays.predict(PIXELS)


def test_a_failing_recipe_shows_its_own_traceback(cluster: ClusterInfo, shoal: Shoal) -> None:
    (cluster.project / "cli_broken.py").write_text(
        "import shoal\n"
        "from jobs.digits import Digits\n"
        "class Broken(Digits):\n"
        "    def loss(self, model, batch):\n"
        "        return self.no_such_thing\n"
    )
    outcome = shoal("train", "cli_broken", "--workers=1", "--steps=5")
    assert outcome.code == 2
    assert "  |     return self.no_such_thing" in outcome.err
    assert "shoal logs broken-" in outcome.err


def test_a_detached_run_goes_on_without_us_until_it_is_stopped(cluster: ClusterInfo, shoal: Shoal) -> None:
    outcome = shoal(
        "train", "jobs.digits", "--detach", "--workers=1", "--steps=1000000", "--name=cli-detached"
    )
    assert outcome.code == 0, outcome.err
    record = RunRecord(Storage(cluster.storage), "cli-detached")
    assert record.state() == RunState.RUNNING
    assert "driven by job" in outcome.out
    taken = shoal("train", "jobs.digits", "--steps=1000000", "--name=cli-detached")
    assert taken.code == 2
    assert "being trained already" in taken.err
    stopped = shoal("stop", "cli-detached")
    assert stopped.code == 0, stopped.err
    assert record.state() == RunState.STOPPED
    assert record.events(("checkpoint",))[-1]["step"] == record.step > 0


def test_a_detached_run_that_does_not_start_says_why(cluster: ClusterInfo, shoal: Shoal) -> None:
    (cluster.project / "cli_no_data.py").write_text(
        "import shoal\n"
        "class NoData(shoal.Recipe):\n"
        "    def build_data(self):\n"
        "        raise FileNotFoundError('where is my data')\n"
    )
    outcome = shoal("train", "cli_no_data", "--detach", "--workers=1", "--steps=5")
    assert outcome.code == 2
    assert "where is my data" in outcome.err
