"""What works, and what is refused cheaply, when no cluster runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Shoal
from rich.text import Text

from shoal.cli.runs import model_name, show_result
from shoal.config import Range
from shoal.errors import ClusterError, NotFoundError, TrackingError
from shoal.storage import FileLock, Storage
from shoal.tracking import RunRecord, Wish
from shoal.train.run import Run
from shoal.train.stall import StallReport, record_stall
from shoal.tune.record import SweepRecord, Trial, TrialState

NO_CLUSTER = "error: no cluster of this project runs; start it: shoal up\n"


def write_run(project: Path, name: str = "digits-1", *, ended: bool = True) -> RunRecord:
    """A run's record as a run leaves it."""
    record = RunRecord(Storage(project / ".shoal"), name)
    objective = {"metric": "accuracy", "mode": "max"}
    record.claim_identity(
        {"recipe": "jobs.digits:Digits", "objective": objective, "fields": {"lr": 0.5}, "seed": 7}
    )
    record.append("start", workers=2, pids=[1, 2], host="here", step=0, target_steps=10, source="fresh")
    record.append("eval", step=10, split="val", values={"loss": 0.5, "accuracy": 0.75})
    if ended:
        record.append("end", step=10, state="finished", error="", traceback="")
    record.logs_dir.mkdir(parents=True)
    (record.logs_dir / "rank-0.log").write_text("hello from rank 0\n")
    return record


@pytest.mark.parametrize(
    "words",
    [
        "env",
        "status",
        "models",
        "models digits",
        "apps",
        "delete digits",
        "register digits run",
        "alias digits champion 1",
        "ui",
        "serve serve_apps.digits:app --model digits@1",
        "train jobs.digits",
        "train jobs.digits --detach",
        "tune jobs.digits lr=log:1e-4..1e-1",
    ],
)
def test_what_needs_a_cluster_says_how_to_start_one(project: Path, shoal: Shoal, words: str) -> None:
    outcome = shoal(*words.split())
    assert (outcome.code, outcome.err) == (2, NO_CLUSTER)
    assert not (project / ".shoal").exists()


def test_without_a_cluster_yaml_it_says_so(
    tmp_path: Path, project: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in ("check", "up", "down", "runs", "train jobs.digits", "doctor"):
        outcome = shoal(*words.split())
        assert outcome.code == 2, words
        assert "cluster.yaml" in outcome.err


def test_check_says_what_the_file_becomes(project: Path, shoal: Shoal) -> None:
    outcome = shoal("check", "--set", "train.workers=2")
    assert (outcome.code, outcome.err) == (0, "")
    assert "4 CPUs, 0 GPUs on this machine" in outcome.out
    assert outcome.out.endswith("no problems\n")


def test_check_reports_every_problem_at_once(project: Path, shoal: Shoal) -> None:
    outcome = shoal("check", "--set", "train.workers=4..1", "--set", "serve.prot=1", "--set", "tune.trials=x")
    assert outcome.code == 2
    for path in ("train.workers", "serve.prot", "tune.trials"):
        assert path in outcome.err


def test_check_writes_the_schema_where_the_example_names_it(project: Path, shoal: Shoal) -> None:
    assert shoal("check", "--schema").code == 0
    assert (
        json.loads((project / ".shoal" / "cluster.schema.json").read_text())["title"] == "shoal cluster.yaml"
    )


def test_up_refuses_a_target_it_cannot_start(project: Path, shoal: Shoal) -> None:
    outcome = shoal("up", "--set", "targets.k8s.image=x", "--target", "k8s")
    assert outcome.code == 2
    assert "--target local" in outcome.err


def test_down_is_content_when_nothing_runs(project: Path, shoal: Shoal) -> None:
    outcome = shoal("down")
    assert (outcome.code, outcome.out) == (0, "no cluster of this project runs\n")


def test_doctor_shows_findings(project: Path, shoal: Shoal) -> None:
    outcome = shoal("doctor")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "versions" in outcome.out
    assert re.search(r"ok +storage .*\.shoal: .* free", outcome.out), outcome.out
    assert not (project / ".shoal").exists()


def test_runs_lists_them_within_100_columns(project: Path, shoal: Shoal) -> None:
    write_run(project, "digits-sweep-1a2b3c4d-t001")
    write_run(project, "b")
    lines = shoal("runs").out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "of", "best", "workers", "age"]
    assert any(line.startswith("digits-sweep-1a2b3c4d-t001 ") for line in lines)
    assert max(map(len, lines)) <= 100


def test_a_long_name_is_whole_in_a_pipe_and_folded_on_a_terminal(
    project: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "digits-" + "a" * 70
    write_run(project, name)
    assert any(line.startswith(name) for line in shoal("runs").out.splitlines())
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    lines = Text.from_ansi(shoal("runs").out).plain.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["run", "state", "step", "of", "best", "workers", "age"]


def test_a_damaged_run_does_not_hide_the_others(project: Path, shoal: Shoal) -> None:
    write_run(project, "a")
    (write_run(project, "b").dir / "identity.json").write_text("{")
    outcome = shoal("runs")
    assert (outcome.code, outcome.err) == (0, "")
    rows = dict(line.split()[:2] for line in outcome.out.splitlines())
    assert rows == {"run": "state", "a": "finished", "b": "damaged"}
    closely = shoal("runs", "b")
    assert closely.code == 1
    assert "b/identity.json" in closely.err


def test_runs_are_listed_newest_first(project: Path, shoal: Shoal) -> None:
    for age, name in enumerate("cbda"):
        os.utime(write_run(project, name).dir / "identity.json", (1000 - age, 1000 - age))
    assert [line.split()[0] for line in shoal("runs").out.splitlines()] == ["run", *"cbda"]
    assert "there are: c, b, d, a\n" in shoal("runs", "nobody").err
    for number in range(6):
        write_run(project, f"e{number}")
    assert " and 2 more\n" in shoal("runs", "nobody").err


def test_a_model_is_called_as_the_app_of_a_new_project_expects() -> None:
    assert model_name("jobs.my_task:MyTask") == "my_task"
    assert model_name("jobs.digits:Digits") == "digits"
    assert model_name("jobs.vision:Small") == "small"


def test_status_says_how_much_tracking_waits() -> None:
    from shoal.cli.status import delivery_text
    from shoal.tracking import TrackerStatus

    fine = TrackerStatus(state="ok", uri="http://mlflow", behind_runs=0, behind_bytes=0)
    assert delivery_text(fine) == "http://mlflow, knows every run"
    behind = replace(
        fine, state="error", behind_runs=2, behind_bytes=2048, error="down", warnings=("first", "second")
    )
    lines = ["http://mlflow", "waiting: 2 KiB of 2 runs", "tries again: down"]
    assert delivery_text(behind).split("\n") == [*lines, "2 warnings, the last: second"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ClusterError("gone"), "gone"),
        (TrackingError("x"), "no answer within 5 s; the tracker is starting, or the machine is busy"),
    ],
)
def test_status_goes_on_without_a_tracker(
    monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    from shoal import cluster
    from shoal.cli.status import _tracking_text

    def silent(*_: object, timeout_s: float) -> None:
        assert timeout_s <= 10
        raise error

    monkeypatch.setattr(cluster, "attach", silent)
    info = SimpleNamespace(tracking="http://mlflow")
    assert _tracking_text(info).split("\n") == ["http://mlflow", f"unknown how much waits: {why}"]  # type: ignore[arg-type]


def test_runs_shows_one_closely(project: Path, shoal: Shoal) -> None:
    write_run(project)
    out = shoal("runs", "digits-1").out
    for text in ("finished", "10 of 10", "jobs.digits:Digits", "lr=0.5", "val accuracy 0.75 at step 10"):
        assert text in out


def test_runs_show_tells_all_that_happened_within_100_columns(
    project: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = write_run(project, ended=False)
    record.append("first_step", step=11)
    for step in (20, 30, 40):
        record.append("checkpoint", step=step, path="c", size_bytes=9, seconds=0.25, pause_s=0.001)
    record.append("lost", ranks=[1], step=40, why="Died")
    record.append("start", workers=2, pids=[1, 3], step=35, target_steps=99, source="checkpoint")
    record.append("first_step", step=36)
    record.append("end", step=99, state="failed", error="boom " * 99)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    closely = Text.from_ansi(shoal("runs", "digits-1").out).plain
    assert re.search(r"lost +step 40 +rank 1\n", closely)
    out = Text.from_ansi(shoal("runs", "show", "digits-1").out).plain
    assert max(map(len, out.splitlines())) <= 100
    for text in (
        "goodput",
        "3 of them from step 20 on, 0.25 s each",
        "rank 1 (pid 2)",
        "from its checkpoint",
    ):
        assert text in out
    assert re.search(r"1 recovery \(median .*\), 5 steps lost", out)
    whole = json.loads(shoal("runs", "show", "digits-1", "--json").out)
    assert (whole["run"], whole["steps_lost"], whole["counts"]["checkpoint"]) == ("digits-1", 5, 3)
    for words in (("a", "b"), ("digits-1", "--json"), ("show", "a", "b")):
        assert shoal("runs", *words).code == 2
    assert "there is no run 'nobody'" in shoal("runs", "show", "nobody").err


def test_a_run_that_does_not_train_is_not_resized(project: Path, shoal: Shoal) -> None:
    write_run(project)
    outcome = shoal("resize", "digits-1", "3")
    assert (outcome.code, outcome.out) == (2, "")
    assert "not being trained (finished at step 10)" in outcome.err
    assert "--workers 3" in outcome.err


def test_a_resize_is_wished_and_shown_until_it_happened(project: Path, shoal: Shoal) -> None:
    record = write_run(project, ended=False)
    with FileLock(record.driver_lock_path):
        record.resizing.begin(Wish(workers=Range(1, 2), most=8, per_worker={"CPU": 1.0}))
        assert re.search(r"^workers +2$", shoal("runs", "digits-1").out, re.M)
        asked = shoal("resize", "digits-1", "3..4")
        assert (asked.code, asked.err) == (0, "")
        assert asked.out == "run digits-1: 3..4 workers are asked for, 2 there; see: shoal runs digits-1\n"
        shown = shoal("runs", "digits-1").out
        assert re.search(
            r"^workers +2; 3..4 from the next step boundary at which there is room$", shown, re.M
        )
        refused = shoal("resize", "digits-1", "9")
        assert (refused.code, refused.out) == (2, "")
        assert "ask for 1 to 8" in refused.err
    record.append("resize", step=12, **{"from": 2, "to": 3})
    assert re.search(r"resize +step 12 +from 2 to 3 workers$", shoal("runs", "digits-1").out, re.M)


def test_an_unknown_run_is_named_with_those_that_exist(project: Path, shoal: Shoal) -> None:
    write_run(project)
    outcome = shoal("runs", "digits-2")
    assert outcome.code == 2
    assert "digits-1" in outcome.err


def write_trial(project: Path, number: int, state: TrialState, ended: str = "stopped") -> RunRecord:
    """A trial's run, which ended as its own journal says, and as its sweep has booked it."""
    record = write_run(project, f"s-t{number:03d}", ended=False)
    record.append("end", step=10, state=ended, error="", traceback="")
    sweep = SweepRecord(Storage(project / ".shoal"), "s")
    objective = {"metric": "accuracy", "mode": "max"}
    sweep.claim({"recipe": "jobs.digits:Digits", "objective": objective, "space": {}})
    sweep.book(Trial(number=number, run=record.name, fields={"lr": 0.5}, state=state, step=10))
    return record


def test_a_trial_that_its_scheduler_ended_reads_pruned_everywhere(project: Path, shoal: Shoal) -> None:
    write_trial(project, 1, TrialState.PRUNED)
    write_trial(project, 2, TrialState.STOPPED)
    write_trial(project, 3, TrialState.PRUNED, ended="finished")  # somebody went on with it by its name
    write_run(project, "s-t004", ended=False).append("end", step=10, state="stopped", error="", traceback="")
    words = dict(line.split()[:2] for line in shoal("runs").out.splitlines()[1:])
    assert words == {"s-t001": "pruned", "s-t002": "stopped", "s-t003": "finished", "s-t004": "stopped"}
    assert re.search(r"^state +pruned$", shoal("runs", "s-t001").out, re.M)
    assert shoal("stop", "s-t001").out == "run s-t001 does not run: pruned at step 10\n"


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("runs digts-1", "digits-1"),
        ("logs digts-1", "digits-1"),
        ("logs faces-ap", "faces-app"),
        ("stop digts-1", "digits-1"),
        ("stop my-sweeep", "my-sweep"),
        ("resize digts-1 2", "digits-1"),
        ("train jobs.digits:Digit", "Digits"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(
    project: Path, shoal: Shoal, words: str, near: str
) -> None:
    write_run(project)
    storage = Storage(project / ".shoal")
    SweepRecord(storage, "my-sweep").claim({"recipe": "jobs.digits:Digits"})
    storage.app_logs_dir.mkdir(parents=True)
    (storage.app_logs_dir / "replica_faces-app_endpoint_a.log").touch()
    outcome = shoal(*words.split())
    assert outcome.code == 2
    assert outcome.err.endswith(f"; did you mean {near}?\n")
    assert "did you mean" not in shoal(*words.split()[:1], "nobody-at-all").err


def test_a_model_that_does_not_exist_is_said_before_anything_is_deployed(
    project: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoal.serve import deploying

    def refuse(*_: object) -> None:
        raise NotFoundError("model 'digits' has no alias 'nosuch'")

    monkeypatch.setattr("shoal.cli.apps.require_running", lambda: SimpleNamespace(project=project))
    monkeypatch.setattr(deploying, "serve_settings", lambda info: None)
    monkeypatch.setattr(deploying, "resolve", refuse)
    outcome = shoal("serve", "serve_apps.digits:app", "--model", "digits@nosuch")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: model 'digits' has no alias 'nosuch'\n"


def test_logs_show_what_a_rank_printed(project: Path, shoal: Shoal) -> None:
    write_run(project)
    assert shoal("logs", "digits-1").out == "hello from rank 0\n"
    outcome = shoal("logs", "digits-1", "--rank", "3")
    assert outcome.code == 2
    assert "there are: 0" in outcome.err


def test_logs_say_of_a_worker_that_hung(project: Path, shoal: Shoal) -> None:
    report = StallReport([1], [4711], 7, "step", 5.2, "did not answer", [""], "", True)
    record_stall(write_run(project), report)
    outcome = shoal("logs", "digits-1")
    assert outcome.out == "hello from rank 0\n"
    assert outcome.err == "rank 1 (pid 4711) did not answer for 5 s after step 7: replaced\n"


def test_logs_of_a_rank_that_printed_nothing_say_so_beside_the_output(project: Path, shoal: Shoal) -> None:
    (write_run(project).logs_dir / "rank-1.log").touch()
    outcome = shoal("logs", "digits-1", "--rank", "1", "-f")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == "run digits-1 has printed nothing on rank 1 so far\n"


def test_what_is_left_of_a_stopped_run_says_where_the_same_command_goes_on(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = write_run(project, ended=False)
    record.append("eval", step=20, split="val", values={"loss": 0.4, "accuracy": 0.5})
    show_result(Run(record))
    out = capsys.readouterr().out
    assert "nothing was committed yet; the same command starts it" in out
    assert re.search(r"^best +val accuracy 0\.75 at step 10$", out, re.M)  # the last one is 0.5
    record.append("checkpoint", step=1200, path="checkpoints/x", size_bytes=1, seconds=0.1, values={})
    record.append("end", step=1200, state="stopped", error="", traceback="")
    show_result(Run(record))
    assert "the same command goes on from step 1,200, which is committed" in capsys.readouterr().out


def test_following_a_run_ends_with_the_run(project: Path, shoal: Shoal) -> None:
    record = write_run(project, ended=False)
    lock_holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from shoal.storage import FileLock\n"
            "lock = FileLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); sys.stdin.read()",
            str(record.lock_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert lock_holder.stdout is not None
    assert lock_holder.stdin is not None
    assert lock_holder.stdout.readline() == b"held\n"

    def end_the_run() -> None:
        with (record.logs_dir / "rank-0.log").open("a") as log:
            log.write("the last word\n")
        lock_holder.communicate()

    timer = threading.Timer(0.5, end_the_run)
    timer.start()
    outcome = shoal("logs", "digits-1", "-f")
    timer.join()
    assert (outcome.code, outcome.out) == (0, "hello from rank 0\nthe last word\n")


def test_logs_of_an_app_come_from_all_its_replicas_and_no_other_apps(project: Path, shoal: Shoal) -> None:
    folder = Storage(project / ".shoal").app_logs_dir
    folder.mkdir(parents=True)
    for app, replica in (("digits", "a"), ("digits", "b"), ("digits-next", "c")):
        (folder / f"replica_{app}_endpoint_{replica}.log").write_text(f"{app} {replica}\n")
    assert sorted(shoal("logs", "digits").out.splitlines()) == ["digits a", "digits b"]


def test_a_log_that_is_rotated_while_it_is_looked_for_does_not_end_the_command(
    project: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Storage(project / ".shoal").app_logs_dir
    folder.mkdir(parents=True)
    (folder / "replica_digits_endpoint_a.log").write_text("digits a\n")
    listed = [folder / "replica_digits_endpoint_gone.log", *folder.glob("replica_*.log")]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(listed))
    assert shoal("logs", "digits").out == "digits a\n"


@pytest.mark.parametrize("owner", ["mine", "theirs"])
def test_runs_are_shown_whatever_the_clusters_record_is(
    project: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    write_run(project)
    (project / ".shoal" / "cluster.json").write_text("{")
    if owner == "theirs":
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
    outcome = shoal("runs")
    assert (outcome.code, outcome.err) == (0, "")
    assert "digits-1" in outcome.out
    refused = shoal("status")
    assert ("as that user" if owner == "theirs" else "shoal down") in refused.err


def test_logs_of_nothing(project: Path, shoal: Shoal) -> None:
    outcome = shoal("logs", "nobody")
    assert outcome.code == 2
    assert "'nobody'" in outcome.err


def test_stopping_what_does_not_run_or_exist(project: Path, shoal: Shoal) -> None:
    record = write_run(project)
    outcome = shoal("stop", "digits-1")
    assert (outcome.code, outcome.out) == (0, "run digits-1 does not run: finished at step 10\n")
    assert not record.stop_requested()
    assert shoal("stop", "nobody").code == 2


def test_a_dry_run_says_what_it_needs_and_writes_nothing(project: Path, shoal: Shoal) -> None:
    outcome = shoal("train", "jobs.digits", "hidden=32", "--workers", "1..4", "--dry-run")
    assert outcome.code == 0, outcome.err
    # 64*32+32 + 32*32+32 + 32*10+10 parameters; samples as jobs/digits.py splits them
    for text in ("3,466", "train 1,197  val 300  test 300", "1 worker: 64, 4 workers: 16", "loss 2.3"):
        assert text in outcome.out
    assert not (project / ".shoal").exists()


def test_a_dry_run_refuses_more_workers_than_fit_before_it_builds_anything(
    project: Path, shoal: Shoal
) -> None:
    outcome = shoal("train", "jobs.digits", "--workers", "9", "--dry-run")
    assert (outcome.code, outcome.out) == (2, "")
    assert "at most 4 fit" in outcome.err


def test_a_dry_run_refuses_a_range_that_allows_no_worker(project: Path, shoal: Shoal) -> None:
    outcome = shoal("train", "jobs.digits", "--workers", "0..2", "--dry-run")
    assert (outcome.code, outcome.out) == (2, "")
    assert "at least 1 worker" in outcome.err


def test_a_dry_run_makes_the_split_that_the_run_would_make(project: Path, shoal: Shoal) -> None:
    (project / "random_split.py").write_text(
        "import torch\nfrom jobs.digits import Digits\nclass Split(Digits):\n    def build_data(self):\n"
        "        print('drew', torch.rand(1).item())\n        return super().build_data()\n"
    )
    import torch

    from shoal.train.seeds import derive_seed, seed_everything

    seed_everything(derive_seed(7, "data"))
    expected = torch.rand(1).item()
    outcome = shoal("train", "random_split:Split", "--seed", "7", "--dry-run")
    assert f"drew {expected}" in outcome.out, outcome.err


def test_a_dry_run_shows_the_recipes_own_error(project: Path, shoal: Shoal) -> None:
    (project / "broken_recipe.py").write_text(
        "import shoal\nclass Broken(shoal.Recipe):\n    def build_data(self):\n        return self.nowhere\n"
    )
    outcome = shoal("train", "broken_recipe", "--dry-run")
    assert outcome.code == 2
    assert "  |     return self.nowhere" in outcome.err
    assert "nowhere" in outcome.err.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("jobs.nope", "jobs.digits"),
        ("jobs.digitz", "did you mean jobs.digits?"),
        ("./jobs/digits.py", "did you mean jobs.digits?"),
        ("jobs.digits lrr=1", "did you mean lr?"),
        ("jobs.digits --batch-size=32", "batch_size=VALUE"),
        ("jobs.digits --worker 2", "--workers"),
        ("jobs.digits batch_size=0", "batch_size is a number of samples, 1 or more"),
        ("jobs.digits:Nope", "Digits"),
        ("jobs.digits lr=fast", "lr"),
        ("jobs.digits lr", "field=value"),
        ("jobs.digits --dry-run --detach", "choose one"),
        ("jobs.digits --dry-run --precision fp8", "bf16"),
        ("jobs.digits --dry-run --workers 4..1", "4..1"),
        ("jobs.digits --dry-run --checkpoint-every soon", "soon"),
        ("jobs.digits --dry-run --steps 0", "steps"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_hint(
    project: Path, shoal: Shoal, words: str, hint: str
) -> None:
    outcome = shoal("train", *words.split())
    assert outcome.code == 2
    assert hint in outcome.err
    assert "Traceback" not in outcome.err
    assert not (project / ".shoal").exists()


def test_a_space_that_cannot_be_searched_is_refused(project: Path, shoal: Shoal) -> None:
    outcome = shoal("tune", "jobs.digits", "lr=log:0..1", "hiden=1..4")
    assert outcome.code == 2
    assert "lr" in outcome.err
    assert "did you mean hidden" in outcome.err
