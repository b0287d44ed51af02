"""A YAML file as plain values that still know their lines, with the overrides laid over them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shoal.errors import ConfigError, Problem

ENV_PREFIX = "SHOAL_SET_"
_MAX_FILE_BYTES = 2**20
_MAX_MERGED_KEYS = 10_000
"""Keys that ``<<`` may copy: nested merges of a small file would fill any memory."""
_MERGE_TAG = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's plain values.

    PyYAML reads YAML 1.1, where ``no`` is false, ``1:30`` is 90, ``1e-3`` is text and ``010`` is 8.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        _check_merges(node)  # here an alias is still the same node in two places; constructing copies
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, AttributeError, IndexError, OverflowError):
            # What PyYAML lets through on `!!int x`, `!!bool x`, `!!timestamp x`, `!!float ""` and `!!float 9:9:...`.
            message = f"not a value of the tag {node.tag!r}; leave the tag out"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None


_Loader.yaml_implicit_resolvers = {}

for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]{1,300}", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # always decimal: in YAML 1.1, 010 is 8


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)

Keys = tuple[str, ...]


@dataclass
class Document:
    """Raw values of a file and its overrides, and where each was written."""

    values: dict[Any, Any]
    node: yaml.MappingNode
    problems: list[Problem]
    """What is wrong with the document itself, whatever the values mean: repeated keys, broken overrides."""
    overridden: dict[Keys, str] = field(default_factory=dict)
    """Which override set a value, such as ``--set``."""

    def origin(self, keys: Sequence[Any]) -> str:
        """Where the value at ``keys``, or else the nearest thing around it, was written."""
        for depth in range(len(keys), 0, -1):
            if source := self.overridden.get(tuple(keys[:depth])):
                return source
        line = self.line(keys)
        return f"line {line}" if line else ""

    def line(self, keys: Sequence[Any]) -> int:
        """Line of the deepest part of ``keys`` that the file has, from 1; 0 when it has none of it."""
        node: yaml.Node | None = self.node
        line = 0
        for key in keys:
            if (found := _child(node, str(key))) is None:
                break
            line, node = found
        return line

    def override(self, keys: Keys, text: str, source: str) -> None:
        """Set one value from the shell or the environment; ``text`` is read as YAML. Runs no code of it."""
        path = ".".join(keys)
        try:
            value = yaml.load(text, _Loader)  # a `yaml.SafeLoader`: plain values only, whatever the tags say
        except (yaml.YAMLError, RecursionError):
            self.problems.append(Problem(path, "the value is not valid YAML", repr(text), source))
            return
        section = self.values
        for depth, key in enumerate(keys[:-1], start=1):
            inner = section.get(key)
            if inner is not None and not isinstance(inner, dict):
                self.problems.append(
                    Problem(path, f"{'.'.join(keys[:depth])} has no parts to set", text, source)
                )
                return
            # A copy, because an anchor may have put the same mapping into two places.
            section[key] = dict(inner or {})
            section = section[key]
        section[keys[-1]] = value
        self.overridden[keys] = source


def read_document(path: Path) -> Document:
    """Read a YAML file, as plain values. Runs no code of it.

    Raises:
        ConfigError: it cannot be read, is not one YAML mapping, or is larger than 1 MiB.
    """

    def wrong(message: str, origin: str = "") -> ConfigError:
        return ConfigError([Problem("", message, origin=origin)], source=str(path))

    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise wrong("larger than 1 MiB; this is not a cluster.yaml")
    try:
        loader = _Loader(content)
        node = loader.get_single_node()
        # First, because constructing moves what ``<<`` names into the nodes, where it looks like a repetition.
        repeated = list(_repeated_keys(node, (), set())) if node is not None else []
        values = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise wrong(f"not valid YAML: {error.problem}", where) from None
    except (yaml.YAMLError, UnicodeError):
        raise wrong("not valid YAML: it holds bytes that are not UTF-8 text") from None
    except RecursionError:
        raise wrong("not valid YAML: nested too deeply") from None
    if node is None:
        raise wrong("empty; the least it needs is `version: 1` and `name: my-cluster`")
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise wrong("must be a mapping of sections, such as `train: {workers: 1..4}`")
    return Document(values=values, node=node, problems=repeated)


def apply_overrides(document: Document, overrides: Sequence[str], env: Mapping[str, str]) -> None:
    """Lay single values over the file: first the environment's, then ``--set``'s, so that the latter win."""
    for variable in sorted(env):
        if variable.startswith(ENV_PREFIX):
            keys = tuple(variable.removeprefix(ENV_PREFIX).lower().split("__"))
            if all(keys):
                document.override(keys, env[variable], variable)
            else:
                message = f"write {ENV_PREFIX}SECTION__FIELD, such as {ENV_PREFIX}TRAIN__WORKERS=2"
                document.problems.append(Problem(variable, message))
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = tuple(path.strip().split("."))
        if equals and all(keys):
            document.override(keys, value, "--set")
        else:
            message = "write --set SECTION.FIELD=VALUE, such as --set train.workers=2"
            document.problems.append(Problem("--set", message, repr(text)))


def _child(node: yaml.Node | None, key: str) -> tuple[int, yaml.Node] | None:
    """The part of ``node`` named ``key``, and its line from 1."""
    if isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
        item = node.value[int(key)]
        return item.start_mark.line + 1, item
    if isinstance(node, yaml.MappingNode):
        for name, value in reversed(
            node.value
        ):  # what a mapping merges with ``<<`` comes before its own keys
            if str(name.value) == key:
                return name.start_mark.line + 1, value
    return None


def _check_merges(root: yaml.Node) -> None:
    """Count what ``<<`` will copy, without copying it.

    Raises:
        ConstructorError: a mapping merges itself, or all together copy more than `_MAX_MERGED_KEYS` keys.
    """
    sizes: dict[int, float] = {}

    def size(mapping: yaml.MappingNode) -> float:
        """Number of keys of the mapping once those that it merges are in it."""
        if id(mapping) not in sizes:
            sizes[id(mapping)] = math.inf  # while it is looked at: coming back here is a circle
            merged = [value for name, value in mapping.value if name.tag == _MERGE_TAG]
            sources = [inner for value in merged for inner in (value, *_items(value))]
            sizes[id(mapping)] = len(mapping.value) + sum(
                size(source) for source in sources if isinstance(source, yaml.MappingNode)
            )
        return sizes[id(mapping)]

    num_copied = 0.0
    for node in _nodes(root):
        if isinstance(node, yaml.MappingNode):
            num_copied += size(node) - len(node.value)
            if num_copied > _MAX_MERGED_KEYS:
                problem = f"merge keys (<<) copy more than {_MAX_MERGED_KEYS} keys, or a mapping into itself"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _nodes(root: yaml.Node) -> list[yaml.Node]:
    """Every node once, however many aliases lead to it."""
    nodes, seen = [root], {id(root)}
    for node in nodes:  # which grows meanwhile
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
        for part in parts + _items(node):
            if id(part) not in seen:
                seen.add(id(part))
                nodes.append(part)
    return nodes


def _items(node: yaml.Node) -> list[yaml.Node]:
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _repeated_keys(node: yaml.Node, path: Keys, seen: set[int]) -> Iterator[Problem]:
    # ``seen`` keeps this linear: anchors make a small file into an exponentially large tree, or a cyclic one.
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first_lines: dict[str, int] = {}
        for name, value in node.value:
            key, line = str(name.value), name.start_mark.line + 1
            if key in first_lines:
                message = f"given twice, first on line {first_lines[key]}; keep one"
                yield Problem(".".join((*path, key)), message, origin=f"line {line}")
            first_lines.setdefault(key, line)
            yield from _repeated_keys(value, (*path, key), seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _repeated_keys(value, (*path, str(index)), seen)
