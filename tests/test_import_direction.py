"""Rooms import one way, in the order of docs/design.md; importing shoal is cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from projects import ROOT

PACKAGE = ROOT / "platform" / "shoal"
ROOMS = (
    "errors", "config", "recipe", "storage", "models", "cluster", "capacity", "tracking", "train", "tune", "serve",
    "api", "cli",
)  # fmt: skip
# Recipe.fit is a door to the training room for a person at a prompt; nothing else may look up.
EXCEPTIONS = {("recipe.py", "train")}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> Iterator[tuple[str, int, bool]]:
    """(room, line, for type checkers only) of every import of shoal in a file."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"shoal.{a.name}" for a in node.names] if node.module == "shoal" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("shoal.") and not name.startswith("shoal.__"):
                yield name.split(".")[1], node.lineno, id(node) in typing_only


PRIVATE = re.compile(r"\bray\.(?:\w+\.)*(?:_private|_internal|_raylet|core\.generated)\b")
# It is loaded by Serve's controller and replaces a private function there; it must load nothing of ours.
MAY_NAME_PRIVATE_PARTS = {"cluster/serve_guard.py"}


def test_only_the_edges_name_private_parts_of_ray() -> None:
    found = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if file.name != "ray_edge.py" and PRIVATE.search(file.read_text())
    }
    assert found == MAY_NAME_PRIVATE_PARTS


def test_every_file_lives_in_a_room_that_has_a_place_in_the_order() -> None:
    rooms = {room_of(file) for file in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    wrong = [
        f"{file.relative_to(PACKAGE)}:{line} imports shoal.{other}"
        for file in PACKAGE.rglob("*.py")
        if room_of(file) == room
        for other, line, typing_only in imports_of(file)
        if other not in allowed and not typing_only and (file.name, other) not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


def test_the_platform_folder_never_shadows_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["shoal", "shoal.train.options"])
def test_importing_loads_nothing_heavy_and_takes_little_cpu(module: str) -> None:
    code = (
        f"import sys, resource; import {module}; "
        "heavy = {'torch', 'ray', 'mlflow', 'pandas', 'numpy', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy; print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(ROOT / "platform"), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2  # seconds of CPU, the interpreter's own start included
