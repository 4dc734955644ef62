"""The shipped JSON schemas say what the records say."""

from __future__ import annotations

import json
import re

import pytest

from stockade import schema


@pytest.mark.parametrize("name", schema.DOCUMENTS)
def test_shipped_schema_is_the_one_that_the_record_gives(name: str) -> None:
    shipped = schema.path(name).read_text(encoding="utf-8")
    assert shipped == schema.generate(name), "a record has changed: run `python -m stockade.schema`"


def test_no_schema_is_shipped_that_nothing_describes() -> None:
    assert sorted(schema.DOCUMENTS) == sorted(path.stem for path in schema.path("spec").parent.glob("*.json"))


@pytest.mark.parametrize("name", schema.DOCUMENTS)
def test_patterns_are_those_of_ecmascript(name: str) -> None:
    def patterns(value: object) -> list[str]:
        if isinstance(value, dict):
            own = [value["pattern"]] if isinstance(value.get("pattern"), str) else []
            return own + [found for inner in value.values() for found in patterns(inner)]
        if isinstance(value, list):
            return [found for inner in value for found in patterns(inner)]
        return []

    for pattern in patterns(json.loads(schema.generate(name))):
        assert not re.search(r"\\[AZ]|\(\?P|\(\?[imsx]", pattern)


def test_schema_of_the_spec_refuses_unknown_keys_and_knows_every_key_of_a_recipe() -> None:
    shapes = json.loads(schema.generate("spec"))["$defs"]
    assert shapes["Spec"]["additionalProperties"] is False
    assert shapes["Service"]["required"] == ["command"]


def test_field_of_the_spec_has_the_description_that_stands_beside_it() -> None:
    properties = json.loads(schema.generate("spec"))["$defs"]["Service"]["properties"]
    assert properties["groups"]["description"] == "supplementary"
