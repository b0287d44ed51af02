"""What the README tells people to type works as written, in the order it is written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from projects import FOUND_SERVE_URL, ROOT, SERVE_URL, outside_environment, write_project

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.M | re.S)
MINUTES = 8


def run_script(script: str, project: Path, *, interpreter: str) -> str:
    environment = outside_environment(PYTHONPATH=f"{project}:{ROOT / 'platform'}")
    file = project / f"readme.{interpreter}"
    file.write_text(script)
    command = (
        ["bash", "-euo", "pipefail", str(file)] if interpreter == "bash" else [sys.executable, str(file)]
    )
    done = subprocess.run(
        command,
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=MINUTES * 60,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n--- printed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_make_targets_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_paths_that_the_documents_name_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_recipe_in_the_readme_trains(tmp_path: Path) -> None:
    (recipe,) = [body for language, body in BLOCKS if language == "python" and "class Tiny" in body]
    assert "accuracy" in run_script(recipe, tmp_path, interpreter="py")


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 60)
def test_the_five_minutes_work_as_written(tmp_path: Path) -> None:
    tour = [
        (language, body)
        for language, body in BLOCKS
        if ("shoal" in body and "make demo" not in body and "class Tiny" not in body)
    ]
    assert [language for language, _ in tour] == ["bash", "python", "bash"]
    project = write_project(tmp_path / "project", cpu=3)  # two workers beside an app
    (project / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "seven.png", project / "docs")
    shutil.rmtree(project / "jobs", ignore_errors=True)
    for part in ("jobs", "serve_apps"):  # `ray job submit` uploads files, not links
        (project / part).unlink(missing_ok=True)
        shutil.copytree(ROOT / part, project / part)
    (project / "platform").symlink_to(ROOT / "platform")
    try:
        for language, body in tour:
            script = body.replace("source .venv/bin/activate", "")
            if language == "bash":
                script = script.replace(SERVE_URL, FOUND_SERVE_URL)
            printed = run_script(script, project, interpreter="bash" if language == "bash" else "py")
            if "curl" in script:
                assert '"class"' in printed
    finally:
        subprocess.run(
            [sys.executable, "-m", "shoal.cli", "down"],
            cwd=project,
            env=outside_environment(PYTHONPATH=str(ROOT / "platform")),
            timeout=120,
            check=False,
        )
