"""``shoal init``: a new project, copied from the one in ``template/`` with its names replaced."""

from __future__ import annotations

import keyword
import os
import re
import shlex
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.command import CLUSTER, command
from shoal.cli.console import say, show_facts
from shoal.errors import RequestError, StorageError

TEMPLATE = Path(__file__).with_name("template")
"""A whole project for a task named ``my_task``, which the linter and type checker read like all other code."""
MAX_NAME = 40
"""Characters of a name: it names the cluster too, which takes no more."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    examples = ("shoal init my-project", "shoal init . --name churn")
    command(app, panel=CLUSTER, examples=examples)(init)


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made where it does not exist yet.")],
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Names recipe, model, app and cluster. Default: the folder's name."
        ),
    ] = None,
) -> None:
    """Write a new project that trains and serves as it is: cluster.yaml, a recipe, an app.

    No file that exists is touched.
    """
    name = _task_name(folder.resolve().name) if name is None else _checked_name(name)
    written = write_project(folder, name)
    for path in written:
        say(f"wrote {path}")
    enter = [] if folder.resolve() == Path.cwd() else [f"cd {shlex.quote(str(folder))}"]
    steps = [*enter, "shoal up", f"shoal train jobs.{name}"]
    show_facts({"read": folder / "README.md", "next": "\n".join(steps)})


def write_project(folder: Path, name: str) -> list[Path]:
    """Write a project for the task ``name`` into ``folder``, all of it or nothing; returns its files.

    Raises:
        RequestError: a file of that name exists already; lists all of them.
        StorageError: the folder cannot be written to.
    """
    project = _project(name)
    _refuse_existing(folder, project)
    written: list[Path] = []
    try:
        for place, text in project.items():
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:  # "x": one that has appeared since stays as it is
                written.append(path)
                file.write(text)
    except OSError as err:
        for path in written:
            path.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {err.filename or folder}: {err.strerror}; no file was left behind"
        ) from err
    return written


def _project(name: str) -> dict[Path, str]:
    """The text of every file of a project for the task ``name``, by place in its folder."""
    names = {"my_task": name, "MyTask": _class_name(name), "my-task": name.replace("_", "-")}
    return {
        Path(
            _replaced(file.relative_to(TEMPLATE).as_posix(), {"gitignore": ".gitignore", **names})
        ): _replaced(file.read_text(encoding="utf-8"), names)
        for file in sorted(TEMPLATE.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts  # an installer compiles what ends in .py
    }


def _replaced(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


def _refuse_existing(folder: Path, project: Mapping[Path, str]) -> None:
    """Refuse if writing ``project`` would replace anything, or meet a file where it needs a folder."""
    needed = {folder / parent for place in project for parent in place.parents} | set(folder.parents)
    in_the_way = [path for path in needed if os.path.lexists(path) and not path.is_dir()]
    # lexists: a link to nowhere is something too.
    in_the_way += [folder / place for place in project if os.path.lexists(folder / place)]
    if in_the_way:
        listed = "\n".join(f"  {path}" for path in sorted(in_the_way))
        raise RequestError(
            f"a new project in {folder} would replace what exists; nothing was written\n{listed}\n"
            "Move it away, choose another folder, or another name: shoal init FOLDER --name NAME"
        )


def _checked_name(name: str) -> str:
    """``name`` itself.

    Raises:
        RequestError: it cannot name a Python module and a class; the message has one that can.
    """
    valid = _task_name(name)
    if name != valid:
        raise RequestError(
            f"{name!r} cannot be the name: use up to {MAX_NAME} lower-case letters, digits and single '_', a letter "
            f"first, and no word of Python's own; such as: --name {valid}"
        )
    return name


def _task_name(text: str) -> str:
    """The name nearest to ``text`` that can name a Python module, a class, a model and, with ``-``, a cluster."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "_", ascii_text).strip("_")
    # "none" is a fine module, but class None is not.
    if not name[:1].isalpha() or keyword.iskeyword(name) or keyword.iskeyword(_class_name(name)):
        name = f"task_{name}"
    return name[:MAX_NAME].strip("_")


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
