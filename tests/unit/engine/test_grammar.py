"""JSON answers parse and obey their schema, even of a model that talks nonsense. About 5 seconds; needs xgrammar."""

from __future__ import annotations

import asyncio
import json

import jsonschema
import pytest
from transformers import AutoTokenizer

from orchestrator.errors import InvalidRequest
from serving.engine.local import LocalEngine
from serving.engine.protocol import FinishReason, JsonObject, JsonSchema, Sampling

pytest.importorskip("xgrammar", reason="JSON answers need xgrammar: pip install xgrammar")

SCHEMA = {
    "type": "object",
    "properties": {
        "person": {"type": "array", "items": {"enum": ["Ada", "Alan", "Grace"]}, "minItems": 1, "maxItems": 3},
        "year": {"enum": [1936, 1952]},
    },
    "required": ["person", "year"],
    "additionalProperties": False,
}


@pytest.fixture
def core(make_engine, tiny_model):
    return make_engine(end=frozenset({AutoTokenizer.from_pretrained(tiny_model("llama")).eos_token_id}))


def test_a_schema_is_obeyed_in_a_mixed_batch(core, greedy, run):
    format = JsonSchema(json.dumps(SCHEMA))
    bound = [greedy([5 + n], new=200, temperature=1.5, seed=n, response_format=format) for n in range(6)]
    free = [greedy([5 + n], new=20) for n in range(3)]
    done = run(core, [*free, *bound])
    for answer in done[3:]:
        assert answer.finish is FinishReason.STOP
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    alone = run(core, [greedy([5 + n], new=20) for n in range(3)])
    assert [d.tokens for d in done[:3]] == [d.tokens for d in alone]


def test_a_json_object_is_one_as_far_as_it_goes(core, greedy, run):
    done = run(core, [greedy([5], new=30, temperature=1.0, seed=n, response_format=JsonObject()) for n in range(5)])
    for answer in done:
        assert answer.text.startswith("{")
        if answer.finish is FinishReason.STOP:
            assert isinstance(json.loads(answer.text), dict)


def test_a_bound_answer_is_the_same_after_a_preemption(make_engine, core, greedy, run):
    format = JsonSchema(json.dumps(SCHEMA))
    requests = [greedy([5 + n] * 9, new=90, temperature=1.0, seed=n, response_format=format) for n in range(4)]
    tight = make_engine(end=core.end, cache_tokens=128)
    assert [d.text for d in run(tight, requests)] == [d.text for d in run(core, requests)]
    assert tight.stats().preemptions > 0


@pytest.mark.parametrize("schema", ["no json", "[1]"])
def test_what_is_no_schema_is_refused_before_it_reaches_an_engine(schema):
    with pytest.raises(InvalidRequest, match="a JSON schema"):
        Sampling(response_format=JsonSchema(schema))


def test_a_schema_that_cannot_be_compiled_is_its_requests_error_alone(core, greedy):
    async def use():
        engine = LocalEngine(core)
        try:
            request = greedy([5], response_format=JsonSchema('{"type": "no such type"}'))
            with pytest.raises(InvalidRequest, match="response_format"):
                await anext(engine.generate(request))
            return [event async for event in engine.generate(greedy([5], response_format=JsonObject()))]
        finally:
            await engine.close()

    assert asyncio.run(use())
