"""The documentation of the config: every field has a docstring; the page and the schema are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from shoal.config import ClusterConfig, json_schema
from shoal.config.load import _PLACEHOLDERS
from shoal.config.reference import reference_page
from shoal.config.sections import Section

PROJECT = Path(__file__).parents[2]
LEAST = {"version": 1, "name": "x"}


def _sections(section: type[Section] = Section) -> Iterator[type[Section]]:
    for inner in section.__subclasses__():
        yield inner
        yield from _sections(inner)


def test_every_section_and_field_is_documented() -> None:
    sections = list(_sections())
    assert len(sections) >= 12
    for section in sections:
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.endswith("."), f"{section.__name__}.{name}"


def test_the_page_is_what_the_docstrings_say() -> None:
    page = (PROJECT / "docs" / "cluster-yaml.md").read_text()
    assert page == reference_page(), "run: PYTHONPATH=platform python -m shoal.config > docs/cluster-yaml.md"
    for section in _sections():
        for name, field in section.model_fields.items():
            assert f"`{name}`" in page
            assert " ".join((field.description or "").split()) in page


def test_every_required_field_has_a_placeholder() -> None:
    required = {
        name for section in _sections() for name, field in section.model_fields.items() if field.is_required()
    }
    assert required == set(_PLACEHOLDERS)


def test_the_schema_stands_alone() -> None:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["title"] == "shoal cluster.yaml"
    assert schema["description"].startswith("A shoal cluster, whole")
    assert "$id" not in schema
    assert schema["$defs"]["Train"]["properties"]["workers"]["default"] == "1"
    assert '"$ref": "http' not in str(schema)


def test_the_schema_accepts_the_example_and_what_a_config_writes() -> None:
    validator = Draft202012Validator(json_schema())
    validator.validate(yaml.safe_load((PROJECT / "cluster.yaml").read_text()))
    pools = {"gpu": {"cpu": 8, "gpu": "L4:1", "nodes": "0..8", "memory": "64Gi", "idle": "5m"}}
    validator.validate(ClusterConfig.from_dict({**LEAST, "pools": pools}).as_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        {"heda": {}},
        {"version": 2},
        {"name": "Has Spaces"},
        {"train": {"workers": "1-4"}},
        {"train": {"checkpoint_every": 30}},
        {"pools": {"gpu": {"nodes": 3}}},
        {"pools": {"GPU": {"cpu": 3}}},
        {"serve": {"port": 70000}},
        {"target": "cloud"},
    ],
)
def test_the_schema_refuses_what_load_refuses(wrong: dict[str, object]) -> None:
    validator = Draft202012Validator(json_schema())
    assert validator.is_valid(LEAST)
    assert not validator.is_valid({**LEAST, **wrong})
