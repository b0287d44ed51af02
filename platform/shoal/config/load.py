"""From a file, the environment and ``--set`` to a checked config; every problem is reported at once."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from shoal.config.checks import check
from shoal.config.document import Document, Keys, apply_overrides, read_document
from shoal.config.machine import Machine
from shoal.config.sections import ClusterConfig, Section
from shoal.config.values import Range
from shoal.errors import ConfigError, Problem, did_you_mean

FILE_NAME = "cluster.yaml"
_MAX_SHOWN = 60
_PLACEHOLDERS: Mapping[str, Any] = {
    "version": 1,
    "name": "placeholder",
    "cpu": 1,
    "hosts": ["placeholder"],
    "ssh_user": "placeholder",
    "image": "placeholder",
}
"""A valid value of every required field, to go on checking where one is missing; never returned."""


def find(start: Path | None = None) -> Path:
    """The absolute path of the nearest ``cluster.yaml``, in ``start`` (default: the current folder) or above.

    Raises:
        ConfigError: there is none.
    """
    folder = (start or Path.cwd()).resolve()
    for candidate in (folder, *folder.parents):
        if (candidate / FILE_NAME).is_file():
            return candidate / FILE_NAME
    message = (
        f"there is none in {folder} or any folder above it; go to your project, or make one: "
        "shoal init my-project (a file of two lines is enough too: `version: 1` and `name: my-cluster`)"
    )
    raise ConfigError([Problem("", message)], source=FILE_NAME)


def load(
    path: Path | None = None,
    *,
    target: str | None = None,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    machine: Machine | None = None,
) -> ClusterConfig:
    """The checked config of a project.

    Later wins: the file, ``SHOAL_SET_SECTION__FIELD`` in ``env`` (default: this process's), ``overrides``
    such as ``"train.workers=2"``, ``target``. ``path`` is the file or its folder; None searches upward from
    the current folder. ``machine`` stands for this one in the checks of target ``local``.

    Raises:
        ConfigError: with every problem that was found, each with its path, its value and what would be valid.
    """
    file = find() if path is None else path / FILE_NAME if path.is_dir() else path
    document = read_document(file)
    apply_overrides(document, overrides, os.environ if env is None else env)
    if target is not None:
        document.values["target"] = target
        document.overridden[("target",)] = "--target"

    broken: dict[Keys, Problem] = {}
    config = _validate(document, broken)
    problems = [*document.problems, *broken.values()]
    if config is not None:
        for finding in check(config, machine or Machine.here()):
            if not _overlap(finding.reads, broken):
                keys = finding.problem.path.split(".")
                problems.append(_with_origin(finding.problem, document.origin(keys)))
    if problems or config is None:
        raise ConfigError(sorted(problems, key=_in_file_order), source=str(file))
    return config


def _validate(document: Document, broken: dict[Keys, Problem]) -> ClusterConfig | None:
    """The config, with defaults where fields are wrong; those go to ``broken`` by their path.

    Going on with defaults lets the checks between sections see the rest of the file. None when a file is
    too wrong for that.
    """
    values = copy.deepcopy(document.values)
    # A wrong value that is taken away may leave a required field missing: one more round.
    for _ in range(3):
        try:
            return ClusterConfig.model_validate(values)
        except ValidationError as failure:
            for error in failure.errors(include_url=False):
                keys = tuple(str(key) for key in error["loc"] if key != "[key]")
                if not _is_known(keys, broken):
                    broken[keys] = _problem(error, keys, document)
                _repair(values, error)
    return None


def _repair(values: dict[Any, Any], error: ErrorDetails) -> None:
    """Take the wrong value away, or fill in the required one that is missing."""
    *parents, last = (key for key in error["loc"] if key != "[key]")
    inner: Any = values
    for key in parents:
        inner = inner[key]
    if error["type"] == "missing":
        inner[last] = _PLACEHOLDERS[str(last)]
    elif isinstance(inner, dict):
        inner.pop(last, None)
    else:
        inner[last] = "placeholder"  # an item of a list: taking it out would shift the others


def _problem(error: ErrorDetails, keys: Keys, document: Document) -> Problem:
    about_key = error["type"] in ("missing", "invalid_key") or "[key]" in error["loc"]
    value = "" if about_key else _shown(error["input"])
    return Problem(".".join(keys), _message(error, keys), value, document.origin(keys))


def _message(error: ErrorDetails, keys: Keys) -> str:
    context = error.get("ctx", {})
    if "[key]" in error["loc"] and error["type"] == "string_type":
        return "a name must be text; quote it"
    match error["type"]:
        case "shoal_value":
            return error["msg"]
        case "extra_forbidden":
            return _unknown_key(keys)
        case "missing":
            return f"required, but not given: {_description(keys)}"
        case "invalid_key":
            return "a key must be text; quote it"
        case "int_type" | "int_parsing_size":
            return "must be a whole number"
        case "float_type":
            return "must be a number"
        case "finite_number":
            return "must be a finite number"
        case "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text; quote it"
        case "tuple_type" | "list_type":
            return "must be a list, such as [a, b]"
        case "too_short" | "string_too_short":
            return "must not be empty"
        case "string_pattern_mismatch":
            return "a name has 1 to 40 of a-z, 0-9 and -, begins with a letter and does not end with -"
        case "model_type" | "dict_type":
            return _not_a_section(keys)
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}"
        case "literal_error":
            choices = context["expected"].replace("'", "")
            return f"must be {choices}{did_you_mean(str(error['input']).lower(), _choices(keys))}"
        case _:
            return error["msg"]


def _unknown_key(keys: Keys) -> str:
    section = _annotation(keys[:-1])
    valid = list(section.model_fields) if _is_section(section) else []
    hint = did_you_mean(keys[-1].lower(), valid)
    if not hint and (homes := list(_sections_with(keys[-1]))):
        hint = f"; did you mean {' or '.join(homes)}?"
    return f"unknown key{hint}" + (" Valid" if hint else "; valid") + f" keys: {', '.join(valid)}"


def _not_a_section(keys: Keys) -> str:
    section = _annotation(keys)
    if _is_section(section):
        return f"must be a mapping of {', '.join(section.model_fields)}"
    return "must be a mapping of names, such as {cpu: {nodes: 1..4, cpu: 8}}"


def _choices(keys: Keys) -> list[str]:
    return [str(choice) for choice in get_args(_annotation(keys)) if isinstance(choice, str)]


def _sections_with(key: str) -> Iterator[str]:
    """Dotted names of the fields called ``key`` in other sections, two levels deep."""
    for name, field in ClusterConfig.model_fields.items():
        section = _unwrap(field.annotation)
        if _is_section(section) and key in section.model_fields:
            yield f"{name}.{key}"


def _description(keys: Keys) -> str:
    section = _annotation(keys[:-1])
    text = section.model_fields[keys[-1]].description if _is_section(section) else None
    return (text or "see docs/cluster-yaml.md").rstrip(".")


def _annotation(keys: Keys) -> Any:
    """The type of the field at ``keys``; None where the format has no such field."""
    current: Any = ClusterConfig
    for key in keys:
        if _is_section(current) and key in current.model_fields:
            current = _unwrap(current.model_fields[key].annotation)
        elif get_origin(current) is dict:
            current = _unwrap(get_args(current)[1])
        else:
            return None
    return current


def _unwrap(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        return next(choice for choice in get_args(annotation) if choice is not type(None))
    return annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _shown(value: object) -> str:
    """A value as people wrote it, short enough for a line; never walks into what it holds."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case Range():
            return str(value)
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _is_known(keys: Keys, broken: Mapping[Keys, Problem]) -> bool:
    """Whether a problem at or inside ``keys`` was reported; then this one came from the repair."""
    return any(known[: len(keys)] == keys for known in broken)


def _overlap(reads: Sequence[str], broken: Mapping[Keys, Problem]) -> bool:
    for path in reads:
        keys = tuple(path.split("."))
        if any(known[: len(keys)] == keys or keys[: len(known)] == known for known in broken):
            return True
    return False


def _with_origin(problem: Problem, origin: str) -> Problem:
    return Problem(problem.path, problem.message, problem.value, origin)


def _in_file_order(problem: Problem) -> int:
    """Problems of the file by line, then those of overrides; sorting is stable."""
    head, _, line = problem.origin.partition("line ")
    return int(line) if not head and line.isdecimal() else 2**31
