"""What a route may say, and what a person is told who writes something else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.errors import RouteInvalid
from orchestrator.names import QualifiedName
from orchestrator.routing.config import MOST_BYTES, RouteConfig, parse_config

ROUTE = QualifiedName("acme", "intents")
ONE = [{"adapter": "acme/intents@3"}]


def test_sparse_in_complete_out():
    config = parse_config(ROUTE, {"adapters": ONE, "fallback": ["base", "acme/old@1"]})
    assert config.adapters[0].weight == 1
    assert [str(each) for each in config.references] == ["acme/intents@3", "acme/old@1"]
    assert RouteConfig.model_validate(json.loads(config.model_dump_json())) == config
    assert hash(config) == hash(parse_config(ROUTE, config.model_dump()))


@pytest.mark.parametrize(
    ("values", "field", "says"),
    [
        ({}, None, "needs an adapter or a base model"),
        ({"adapters": [{"adapter": "acme/intents"}]}, "adapters.0.adapter", "does not say which version"),
        ({"adapters": [{"adapter": "../../etc@1"}]}, "adapters.0.adapter", "no name of a"),
        ({"adapters": [{"adapter": 3}]}, "adapters.0.adapter", "does not say which version"),
        ({"adapters": [{"adapter": "acme/intents@1", "weight": 0}]}, "adapters.0.weight", "greater than or equal to 1"),
        ({"adapters": ONE * 2}, None, "named twice"),
        ({"adapters": ONE, "fallback": ["base", "base"]}, None, "named twice"),
        ({"adapters": ONE, "fallback": ["none"]}, "fallback.0", "does not say which version"),
        ({"base_model": "tiny", "fallback": ["base"]}, None, "is the base model already"),
        ({"adapters": ONE, "fallbak": ["base"]}, "fallbak", "not permitted"),
        ({"adapters": ONE, "defaults": {"sampling": {"temperature": 3}}}, "defaults.sampling.temperature", "less than"),
        ({"adapters": ONE, "defaults": {"sampling": {"temperature": float("nan")}}}, "defaults.sampling.temperature", "should be"),
        ({"adapters": ONE, "defaults": {"sampling": {"stop": list("abcde")}}}, "defaults.sampling.stop", "at most 4"),
        ({"adapters": ONE, "defaults": {"system": "a\0b"}}, "defaults.system", "NUL"),
        ({"adapters": ONE, "defaults": {"system": "x" * (MOST_BYTES + 1)}}, "defaults.system", "at most"),
        ({"adapters": ONE, "defaults": {"json_schema": "{"}}, "defaults.json_schema", "no JSON"),
        ({"adapters": ONE, "defaults": {"json_schema": [1]}}, "defaults.json_schema", "is an object"),
        ({"adapters": ONE, "defaults": {"json_schema": {"a": "x" * MOST_BYTES}}}, "defaults.json_schema", "longer than"),
    ],
)  # fmt: skip
def test_what_is_refused(values: dict[str, Any], field: str | None, says: str):
    with pytest.raises(RouteInvalid, match=says) as caught:
        parse_config(ROUTE, values)
    assert caught.value.context["field"] == field
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "values",
    [
        {"adapters": [{"adapter": "globex/intents@1"}]},
        {"adapters": ONE, "fallback": ["globex/intents@production"]},
        {"adapters": [{"adapter": "globex/intents@sha256:" + "ab" * 32}]},
    ],
)
def test_another_tenants_adapters_are_refused(values: dict[str, Any]):
    with pytest.raises(RouteInvalid, match="another tenant's"):
        parse_config(ROUTE, values)


def test_a_schemas_properties_keep_their_order():
    schema = {"type": "object", "properties": {"zebra": {"type": "string"}, "ant": {"type": "integer"}}}
    for given in (schema, json.dumps(schema, indent=4)):
        text = parse_config(ROUTE, {"adapters": ONE, "defaults": {"json_schema": given}}).defaults.json_schema
        assert text == json.dumps(schema, separators=(",", ":"))
