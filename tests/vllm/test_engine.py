"""vLLM keeps the promises of the `Engine` protocol, and says what our own engine says. Two minutes, most of it three starts."""

from __future__ import annotations

import asyncio
import json
import time

import jsonschema
import psutil
import pytest
import torch

from orchestrator.errors import (
    AdapterError,
    AdapterInUse,
    AdapterNotLoaded,
    EngineOverloaded,
    EngineStopped,
    InvalidRequest,
    NoFreeSlot,
    StepFailed,
)
from orchestrator.modeling.adapter_files import read_adapter
from orchestrator.modeling.prompts import end_tokens, load_tokenizer
from serving.engine.prepared import prepare
from serving.engine.protocol import FinishReason, JsonObject, JsonSchema

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

PROMPTS = [tuple(range(5 + n, 5 + n + length)) for n, length in enumerate((3, 17, 41, 1, 80, 33, 130, 9))]
LONG = tuple(5 + n * n % 300 for n in range(300))
"""More than two of vLLM's blocks, which have 128 tokens on a CPU."""


# --- what it says ---------------------------------------------------------------------------------------------------


def test_a_mixed_batch_says_what_each_says_alone_and_what_our_engine_says(vllm, ours, greedy):
    names = (None, "all", "rs", "mixed")
    requests = [greedy(prompt, names[n % len(names)], 24) for n, prompt in enumerate(PROMPTS)]
    vllm.run(vllm.load("all", "rs", "mixed"))
    mixed = vllm.run(vllm.ask_all(requests))
    alone = [vllm.run(vllm.ask(request)) for request in requests]
    assert [d.tokens for d in mixed] == [d.tokens for d in alone]
    expected = ours(requests)
    assert [d.tokens for d in mixed] == [d.tokens for d in expected]
    assert [d.text for d in mixed] == [d.text for d in expected]
    assert [d.finish for d in mixed] == [FinishReason.LENGTH] * len(PROMPTS)
    assert [d.usage.completion for d in mixed] == [24] * len(PROMPTS)
    base = ours([greedy(prompt, None, 24) for prompt in PROMPTS])
    changed = [a.tokens != b.tokens for a, b in zip(expected, base, strict=True)]
    assert changed == [n % len(names) > 0 for n in range(len(PROMPTS))], "each adapter must have an effect"


def test_answers_end_where_the_engine_ends(vllm, ours, greedy):
    request = greedy(LONG, new=400)
    [expected], done = ours([request]), vllm.run(vllm.ask(request))
    assert (len(done.tokens), done.finish) == (512 - len(LONG), FinishReason.LENGTH)
    assert done.tokens == expected.tokens


def test_the_end_of_turn_ends_an_answer_and_is_no_part_of_it(vllm, greedy, base):
    tokenizer = load_tokenizer(base)
    [end] = end_tokens(tokenizer)
    requests = [greedy([5 + n], new=400, temperature=2.0, seed=n, ignore_end=False) for n in range(8)]
    ended = [d for d in vllm.run(vllm.ask_all(requests)) if d.finish is FinishReason.STOP]
    assert ended, "one token of 320 ends the turn, and 3,200 were drawn"
    for done in ended:
        assert end not in done.tokens
        assert done.usage.completion == len(done.tokens) < 400
        assert done.text == tokenizer.decode(done.tokens, skip_special_tokens=True).rstrip("\ufffd")


def test_nothing_of_the_prompt_is_in_an_answer(vllm, ours, greedy):
    """Bytes that are no whole character at the prompt's end."""
    requests = [greedy([*range(5, 15), *range(60, 60 + n)], new=12) for n in (110, 130, 150)]
    done = vllm.run(vllm.ask_all(requests))
    assert [d.text for d in done] == [d.text for d in ours(requests)]


def test_a_stop_text_ends_an_answer_before_it(vllm, greedy):
    whole = vllm.run(vllm.ask(greedy([5], new=60, temperature=1.0, seed=3)))
    stop = whole.text[20:25]
    before = whole.text.index(stop)
    done = vllm.run(vllm.ask(greedy([5], new=60, temperature=1.0, seed=3, stop=(stop, "never said"))))
    assert (done.text, done.finish) == (whole.text[:before], FinishReason.STOP)
    assert len(done.pieces) > 2, "it streams all the same"
    assert done.tokens == whole.tokens[: len(done.tokens)]


def test_a_seed_gives_the_same_answer_in_any_batch(vllm, greedy):
    request, other = (greedy([5, 6], new=20, temperature=1.0, seed=seed) for seed in (2**63 + 7, 8))
    alone = vllm.run(vllm.ask(request))
    crowd = [greedy([7 + n], new=20, temperature=1.5) for n in range(6)]
    in_batch, different = vllm.run(vllm.ask_all([*crowd, request, other]))[-2:]
    assert in_batch.tokens == alone.tokens != different.tokens


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_likeliest_token_alone_is_the_greedy_answer(vllm, greedy, limit):
    sampled = greedy([5, 6, 7], temperature=1.5, **limit)
    assert vllm.run(vllm.ask(sampled)).tokens == vllm.run(vllm.ask(greedy([5, 6, 7]))).tokens


SCHEMA = {
    "type": "object",
    "properties": {
        "year": {"enum": [1936, 1952]},
        "names": {"type": "array", "items": {"enum": ["Ada"]}, "maxItems": 2},
    },
    "required": ["year", "names"],
    "additionalProperties": False,
}


def test_json_obeys_its_schema_beside_free_answers(vllm, greedy):
    format = JsonSchema(json.dumps(SCHEMA))
    bound = [greedy([5 + n], new=300, temperature=1.0, seed=n, response_format=format) for n in range(4)]
    objects = [greedy([5], new=30, temperature=1.0, seed=n, response_format=JsonObject()) for n in range(2)]
    done = vllm.run(vllm.ask_all([*bound, *objects, greedy([5, 6, 7])]))
    for answer in done[:4]:
        assert answer.finish is FinishReason.STOP
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert all(answer.text.startswith("{") for answer in done[4:6])
    assert done[6].tokens == vllm.run(vllm.ask(greedy([5, 6, 7]))).tokens


def test_a_schema_that_cannot_be_used_is_its_requests_fault(vllm, greedy):
    format = JsonSchema(json.dumps({"type": "object", "properties": {"a": {"type": "no such type"}}}))
    with pytest.raises(InvalidRequest) as caught:
        vllm.run(vllm.ask(greedy([5], response_format=format)))
    assert caught.value.context["field"] == "response_format.schema"
    assert vllm.run(vllm.ask(greedy([5]))).finish is FinishReason.LENGTH


# --- clients --------------------------------------------------------------------------------------------------------


async def until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_client_that_goes_away_frees_its_place(vllm, greedy):
    async def use():
        stream = vllm.engine.generate(greedy(LONG[:50], new=400))
        await anext(stream)
        stats = vllm.engine.stats()
        assert (stats.running, stats.cache_tokens_used > 0) == (1, True)
        task = asyncio.create_task(vllm.ask(greedy([7], new=400)))
        await asyncio.sleep(0.05)
        task.cancel()
        await stream.aclose()
        await until(lambda: vllm.engine.stats().running == vllm.engine.stats().waiting == 0)
        assert vllm.engine.stats().cache_tokens_used == 0
        before = vllm.engine.stats().steps
        await asyncio.sleep(0.3)
        assert vllm.engine.stats().steps - before < 5, "nothing is computed for who went away"

    vllm.run(use())


def test_abort_ends_the_stream_without_a_last_event(vllm, greedy):
    async def use():
        request = greedy([5, 6, 7], new=400)
        stream = vllm.engine.generate(request)
        await anext(stream)
        await vllm.engine.abort(request.id)
        assert all([event.finish is None async for event in stream])
        await vllm.engine.abort("unknown")

    vllm.run(use())


@pytest.mark.parametrize(
    ("prompt", "says"),
    [((), "is empty"), ((5, 320), "outside the vocabulary"), (range(512), "may have 512")],
)
def test_what_could_never_be_answered_is_refused(vllm, greedy, prompt, says):
    prompt = [token % 300 for token in prompt] if len(prompt) > 2 else prompt
    with pytest.raises(InvalidRequest, match=says):
        vllm.run(vllm.ask(greedy(prompt)))


def test_too_many_are_told_to_come_later_and_an_id_has_one_answer(vllm, greedy):
    async def use():
        first = greedy([5], new=200)
        tasks = [asyncio.create_task(vllm.ask(first))]
        tasks += [asyncio.create_task(vllm.ask(greedy([6 + n], new=200))) for n in range(11)]
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="is being answered"):
            await vllm.ask(first)
        with pytest.raises(EngineOverloaded):
            await vllm.ask(greedy([5]))
        await until(lambda: vllm.engine.stats().waiting > 0)
        assert [len(done.tokens) for done in await asyncio.gather(*tasks)] == [200] * 12

    vllm.run(use())


# --- adapters -------------------------------------------------------------------------------------------------------


def test_adapters_come_and_go_while_others_are_answered(vllm, ours, greedy):
    async def use():
        steady = asyncio.create_task(vllm.ask(greedy([5, 6, 7], new=300)))
        with pytest.raises(AdapterNotLoaded):
            await vllm.ask(greedy([5], "all"))
        await vllm.load("all", "all", "rs")
        stream = vllm.engine.generate(greedy([5], "all", new=400))
        await anext(stream)
        with pytest.raises(AdapterInUse):
            await vllm.engine.unload_adapter("all")
        await stream.aclose()
        await vllm.engine.unload_adapter("all")
        await vllm.engine.unload_adapter("all")
        assert vllm.engine.stats().adapters == ("rs",)
        await vllm.load("all")
        again = await vllm.ask(greedy([5], "all"))
        return again, await steady

    again, steady = vllm.run(use())
    assert again.tokens == ours([greedy([5], "all")])[0].tokens
    assert steady.tokens == ours([greedy([5, 6, 7], new=300)])[0].tokens


def test_an_adapter_that_vllm_would_not_apply_is_refused(vllm, greedy, adapters):
    async def refused(name):
        with pytest.raises(AdapterError) as caught:
            await vllm.load(name)
        return caught.value.context["check"], caught.value.message

    async def use():
        await vllm.load("all")
        before = await vllm.ask(greedy([5], "all"))
        reasons = {name: await refused(name) for name in ("wide", "phantom", "foreign")}
        reasons["missing"] = await refused("missing")
        assert vllm.engine.stats().adapters == ("all",)
        assert await vllm.loaded() == {"all"}, "what was refused has left vLLM as well"
        assert (await vllm.ask(greedy([5], "all"))).tokens == before.tokens
        return reasons

    vllm.adapters = adapters | {"missing": adapters["all"] / "nowhere"}
    reasons = vllm.run(use())
    assert {name: check for name, (check, _) in reasons.items()} == {
        "wide": "rank",
        "phantom": "names",
        "foreign": "names",
        "missing": "config",
    }
    assert "model.layers.7" in reasons["phantom"][1], "vLLM's own workers say it: the engine was told of that linear"


def test_adapters_change_places_all_of_them_or_none(vllm, greedy, adapters):
    engine = vllm.engine

    def prepared(name):
        config, tensors = read_adapter(adapters[name])
        return prepare(config, tensors, engine._places, torch.float32, name)

    async def use():
        await engine.swap_adapters({name: prepared(name) for name in ("all", "rs", "mixed")}, [])
        alone = await vllm.ask(greedy([5], "all"))
        with pytest.raises(NoFreeSlot):
            await engine.swap_adapters({"b": prepared("rs"), "c": prepared("rs")}, [])
        with pytest.raises(AdapterError):
            await engine.swap_adapters({"b": prepared("rs"), "phantom": prepared("phantom")}, ["all"])
        assert set(engine.stats().adapters) == {"all", "rs", "mixed"}
        assert await vllm.loaded() == {"all", "rs", "mixed"}
        await engine.swap_adapters({"b": prepared("rs"), "all": prepared("mixed")}, ["rs", "mixed"])
        assert set(engine.stats().adapters) == {"all", "b"}
        assert (await vllm.ask(greedy([5], "all"))).tokens == alone.tokens, "what is there already stays as it is"

    vllm.run(use())


def test_a_prefix_is_shared_by_the_same_adapter_only(vllm, ours, greedy, adapters):
    names = (None, "all", "rs")
    prompt = tuple(token + 9 for token in LONG)  # which no other test asks
    expected = ours([greedy(prompt, name) for name in names])
    vllm.run(vllm.load("all", "rs"))
    first = [vllm.run(vllm.ask(greedy(prompt, name))) for name in names]
    again = [vllm.run(vllm.ask(greedy(prompt, name))) for name in names]
    assert [d.usage.cached for d in first] == [0, 0, 0]
    assert [d.usage.cached for d in again] == [256, 256, 256]
    assert [d.tokens for d in first] == [d.tokens for d in again] == [d.tokens for d in expected]


def test_another_version_in_an_adapters_place_shares_nothing_with_it(vllm, ours, greedy, adapters):
    vllm.adapters = adapters | {"version-1": adapters["mixed"], "version-2": adapters["rs"]}
    prompt = LONG[::-1]
    vllm.run(vllm.load("version-1"))
    vllm.run(vllm.ask(greedy(prompt, "version-1")))
    vllm.run(vllm.engine.unload_adapter("version-1"))
    vllm.run(vllm.load("version-2"))
    done = vllm.run(vllm.ask(greedy(prompt, "version-2")))
    assert done.usage.cached == 0
    assert done.tokens == ours([greedy(prompt, "rs")])[0].tokens


# --- its end --------------------------------------------------------------------------------------------------------


def processes(engine):
    """vLLM's: the engine's and its workers."""
    roots = [psutil.Process(p.pid) for p in engine._llm.engine_core.resources.engine_manager.processes]
    return [*roots, *(child for root in roots for child in root.children(recursive=True))]


def test_closing_ends_streams_and_leaves_no_process(fresh_vllm, greedy):
    engine = fresh_vllm.engine
    started = processes(engine)
    assert len(started) > 1

    async def use():
        stream = engine.generate(greedy([5, 6, 7], new=400))
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineStopped):
            async for _ in stream:
                pass
        with pytest.raises(EngineStopped):
            await fresh_vllm.ask(greedy([5]))
        assert not engine.alive

    fresh_vllm.run(use())
    assert psutil.wait_procs(started, timeout=30)[1] == []
    assert not engine._directory.exists()
    assert fresh_vllm.died == 0


def test_a_killed_engine_says_so_and_is_not_alive(fresh_vllm, greedy):
    engine = fresh_vllm.engine

    async def use():
        stream = engine.generate(greedy([5, 6, 7], new=400))
        await anext(stream)
        processes(engine)[0].kill()
        with pytest.raises(StepFailed):
            async for _ in stream:
                pass
        await until(lambda: fresh_vllm.died == 1)
        assert not engine.alive
        with pytest.raises(EngineStopped):
            await fresh_vllm.ask(greedy([5]))
        assert engine.stats().failed_steps == 1

    fresh_vllm.run(use())
