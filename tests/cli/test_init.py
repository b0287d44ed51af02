"""``shoal init``: the project that it writes is whole, and no file that exists is touched."""

from __future__ import annotations

import json
import keyword
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from asgi_harness import get, post
from command_line import Shoal
from hypothesis import given
from hypothesis import strategies as st

import shoal.recipe
from projects import FOUND_SERVE_URL, ROOT, SERVE_URL
from shoal.cli.init import MAX_NAME, TEMPLATE, _class_name, _task_name
from shoal.models import Lineage, write_package

FILES = [
    ".gitignore",
    "README.md",
    "cluster.yaml",
    "jobs/__init__.py",
    "jobs/churn.py",
    "serve_apps/__init__.py",
    "serve_apps/churn.py",
    "serve_apps/churn.yaml",
]
MINUTES = 8


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def written(tmp_path: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new project for the task ``churn``; the current folder."""
    for name in list(os.environ):
        if name.startswith("SHOAL_"):
            monkeypatch.delenv(name)
    folder = tmp_path / "a new project"
    outcome = shoal("init", str(folder), "--name", "churn")
    assert outcome.code == 0, outcome.err
    monkeypatch.chdir(folder)
    return folder


def load(file: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the new project, under a name that hides none of this repository's."""
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_it_writes_a_whole_project(written: Path) -> None:
    assert files_in(written) == sorted(FILES)
    for file in FILES:
        text = (written / file).read_text()
        assert not re.search("my.?task", text, re.I), file
        if file.endswith(".py"):
            compile(text, file, "exec")


def test_it_says_what_it_wrote_and_what_to_type(tmp_path: Path, shoal: Shoal) -> None:
    outcome = shoal("init", str(tmp_path / "Customer churn"))
    assert outcome.code == 0, outcome.err
    for line in (
        f"wrote {tmp_path / 'Customer churn' / 'jobs' / 'customer_churn.py'}",
        f"cd '{tmp_path / 'Customer churn'}'",
        "shoal train jobs.customer_churn",
    ):
        assert line in outcome.out


def test_check_finds_no_problem_in_it(written: Path, shoal: Shoal) -> None:
    outcome = shoal("check")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"^cluster +churn$", outcome.out, re.M)
    assert outcome.out.endswith("no problems\n")


def test_the_recipe_learns_and_the_app_answers_with_its_model(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(written / "jobs" / "churn.py", "written_recipe", monkeypatch).Churn()
    fitted = recipe.fit(steps=50)
    assert fitted.val["accuracy"] > 0.9  # a coin has 0.5, the best line through the crescents about 0.87
    lineage = Lineage(
        recipe="written_recipe:Churn",
        fields=shoal.recipe.field_values(recipe),
        data_fingerprint="none",
        code_revision="",
        run="fitted",
        trial=None,
        checkpoint_step=50,
        metrics={},
        created=0.0,
    )
    write_package(tmp_path / "1", fitted.model.state_dict(), model="churn", version=1, lineage=lineage)
    endpoint = load(written / "serve_apps" / "churn.py", "written_app", monkeypatch).Churn()
    endpoint.load(tmp_path / "1")
    asgi = endpoint.asgi()
    for expected, example in enumerate(endpoint.examples.values()):
        answer = post(asgi, json.dumps(example).encode(), "application/json")
        assert answer.status == 200, answer.body
        assert (answer.json["class"], answer.json["model"]) == (expected, "churn")
        assert len(answer.json["probabilities"]) == 2
        assert sum(answer.json["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert get(asgi, "/openapi.json").status == 200
    for body in (
        "{}", "[0, 1]", '{"features": 1}', '{"features": [0]}', '{"features": [0, "1"]}',
        '{"features": [0, true]}', '{"features": [0, NaN]}', '{"features": [0, 1e39]}',
        '{"features": [0, ' + "9" * 400 + "]}",
    ):  # fmt: skip
        answer = post(asgi, body.encode(), "application/json")
        assert (answer.status, answer.code) == (422, "features"), body


def test_nothing_is_written_where_any_file_exists(tmp_path: Path, shoal: Shoal) -> None:
    folder = tmp_path / "churn"
    (folder / "jobs").mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    (folder / "jobs" / "churn.py").symlink_to("nowhere")
    (folder / "serve_apps").write_text("a file")
    outcome = shoal("init", str(folder))
    assert outcome.code == 2
    for name in ("README.md", "jobs/churn.py", "serve_apps"):
        assert f"  {folder / name}\n" in outcome.err
    assert "cluster.yaml" not in outcome.err
    assert files_in(folder) == ["README.md", "serve_apps"]
    assert (folder / "README.md").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path: Path, shoal: Shoal) -> None:
    (tmp_path / "churn").write_text("mine")
    for folder in ("churn", "churn/below"):
        outcome = shoal("init", str(tmp_path / folder))
        assert outcome.code == 2
        assert f"  {tmp_path / 'churn'}\n" in outcome.err


def test_other_files_may_be_there(tmp_path: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    outcome = shoal("init", ".", "--name", "churn")
    assert outcome.code == 0, outcome.err
    assert "cd " not in outcome.out
    assert files_in(tmp_path) == sorted([*FILES, "jobs/mine.py"])


def test_a_disk_that_takes_no_more_leaves_no_file(
    tmp_path: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_open = Path.open

    def fills_up(path: Path, *args: object, **kwargs: object) -> object:
        if path.name == "churn.yaml":
            raise OSError(28, "No space left on device", str(path))
        return plain_open(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", fills_up)
    outcome = shoal("init", str(tmp_path), "--name", "churn")
    assert outcome.code == 1
    assert "No space left" in outcome.err
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("my-project", "my_project"),
        ("Größe 2", "groe_2"),
        ("2048", "task_2048"),
        ("class", "task_class"),
        ("none", "task_none"),
        ("..", "task"),
        ("数据", "task"),
        ("_a__b_", "a_b"),
        ("gitignore", "gitignore"),
        ("x" * 50, "x" * MAX_NAME),
    ],
)
def test_a_name_is_made_of_the_folders(tmp_path: Path, shoal: Shoal, text: str, name: str) -> None:
    assert _task_name(text) == name
    if text == "..":
        return
    assert shoal("init", str(tmp_path / text)).code == 0
    assert (tmp_path / text / "jobs" / f"{name}.py").exists()
    for path in (tmp_path / text).rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
    outcome = shoal("init", str(tmp_path / "other"), "--name", text)
    if text == name:
        assert outcome.code == 0
    else:
        assert outcome.code == 2
        assert outcome.err.endswith(f"--name {name}\n")
        assert not (tmp_path / "other").exists()


@given(st.text())
def test_any_text_becomes_a_name_that_stays_as_it_is(text: str) -> None:
    name = _task_name(text)
    assert _task_name(name) == name
    assert re.fullmatch(
        "[a-z]([a-z0-9_]{0,38}[a-z0-9])?", name
    )  # as config asks of a cluster, with '_' for '-'
    for identifier in (name, _class_name(name)):
        assert identifier.isidentifier()
        assert not keyword.iskeyword(identifier)


def test_an_installed_wheel_has_the_template(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "platform", source / "platform", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), "."],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    prefix = "shoal/cli/template/"
    packed = {name.removeprefix(prefix) for name in zipfile.ZipFile(wheel).namelist() if prefix in name}
    assert packed == {file for file in files_in(TEMPLATE) if "__pycache__" not in file}


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 60)
def test_its_readme_works_as_written(written: Path) -> None:
    """Up, train, register, serve, ask and down, each as its own process, as a person types them."""
    from shoal.cluster import find, processes

    (script, _) = re.findall(r"^```bash\n(.*?)^```", (written / "README.md").read_text(), flags=re.M | re.S)
    *before, down = script.splitlines(keepends=True)
    assert down.startswith("shoal down ")
    assert SERVE_URL in script
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "platform"),
        "SHOAL_SET_SERVE__PORT": "0",
    }

    def run(lines: str, timeout_s: float) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines],
            cwd=written,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{lines}\n--- printed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    info = None
    try:
        printed = run("".join(before).replace(SERVE_URL, FOUND_SERVE_URL), MINUTES * 60)
        info = find(written)
        answer = json.loads(printed.splitlines()[-1])
        assert (answer["class"], answer["model"], answer["version"]) == (0, "churn", 1)
    finally:
        run(down, 120)
    assert info is not None
    left = processes.find(info.cluster_id)
    assert not left, f"the cluster left processes behind: {processes.describe(left)}"
