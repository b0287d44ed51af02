"""The config's documentation, from its docstrings: a JSON Schema for editors, a page for people.

``python -m shoal.config`` prints ``docs/cluster-yaml.md``, and a test compares the two.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from shoal.config.sections import NOT_YET, ClusterConfig
from shoal.config.values import Gpus, Range

_INTRODUCTION = """\
# cluster.yaml

One file describes a cluster: what it is made of, what its jobs and apps default to, and where it runs.
It is found in the current folder or the nearest one above it. `version` and `name` are all it needs.

- **Values.** A range is `1..4`, or `3` for 3..3. A size is `8Gi` (2^30), `8G` (10^9) or a number of bytes.
  A duration is a number and a unit: `250ms`, `30s`, `5m`, `1.5h`, `2d`. GPUs are `L4:1` or `1`.
- **Plain YAML 1.2.** Only `true` and `false` are booleans; `no` and `1:30` are text. No key twice.
- **Overrides.** `--set train.workers=2` sets one value for one command; `SHOAL_SET_TRAIN__WORKERS=2` in the
  environment does so for all (`__` between the parts; any case; names with a dash need `--set`). `--set` wins
  over the environment, and the environment over the file. Values are read as YAML.
- **Checks.** `shoal check` reports every problem at once, between sections too, for the chosen target.
- **Editors.** `shoal check --schema` writes `.shoal/cluster.schema.json`, named in the example's first line.
"""

_NOT_YET_REMARK = "*Checked, but nothing acts on it yet.*"


class _SchemaWriter(GenerateJsonSchema):
    """Writes defaults as people do: pydantic would take a Range apart into its attributes."""

    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Range | Gpus) else super().encode_default(dft)


def json_schema() -> dict[str, Any]:
    """A self-contained JSON Schema (draft 2020-12) of ``cluster.yaml``, for editors to complete and check."""
    schema = ClusterConfig.model_json_schema(schema_generator=_SchemaWriter)
    schema["title"] = "shoal cluster.yaml"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def reference_page() -> str:
    """The text of ``docs/cluster-yaml.md``."""
    schema = json_schema()
    parts = [_INTRODUCTION]
    parts += _tables("", schema, schema["$defs"])
    return "\n".join(parts)


def _tables(path: str, section: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """A table of this section, then those of the sections inside it."""
    title = f"## {path}" if path else "## The file"
    lines = [title, section["description"], "", "| field | default | what it is |", "| --- | --- | --- |"]
    inner: list[str] = []
    for name, field in section["properties"].items():
        target, suffix = _section_of(field, definitions)
        required = name in section.get("required", ())
        if target is not None:
            inner += _tables(f"{path}.{name}{suffix}".lstrip("."), target, definitions)
            default = "" if not required else "required"
        else:
            default = "required" if required else _default(field.get("default"))
        # pydantic leaves a field's description out where it is the same as its section's.
        description = field.get("description") or (target or {})["description"]
        words = description.split() + ([_NOT_YET_REMARK] if NOT_YET in field else [])
        lines.append(f"| `{name}` | {default} | {' '.join(words)} |")
    return [*lines, "", *inner]


def _section_of(field: dict[str, Any], definitions: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The section that a field holds, and what its path needs to name it; None for a plain value."""
    for choice in (field, *field.get("anyOf", ())):
        if "$ref" in choice:
            return definitions[choice["$ref"].removeprefix("#/$defs/")], ""
        for inner in choice.get("patternProperties", {}).values():
            return definitions[inner["$ref"].removeprefix("#/$defs/")], ".NAME"
    return None, ""


def _default(value: object) -> str:
    if value is None:
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
