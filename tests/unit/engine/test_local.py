"""The engine behind asyncio: streams, clients that go away, adapters that come and go, its end. About 5 seconds."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from orchestrator.errors import (
    AdapterError,
    AdapterInUse,
    AdapterNotLoaded,
    EngineStopped,
    InvalidRequest,
    NoFreeSlot,
    StepFailed,
)
from orchestrator.modeling.adapter_files import read_adapter
from serving.engine.local import LocalEngine
from serving.engine.prepared import prepare
from serving.engine.protocol import FinishReason


def with_engine(core, use):
    """Run `use(engine)` in an event loop of its own, and close the engine whatever happens."""

    async def main():
        engine = LocalEngine(core)
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(main(), timeout=60))


async def collect(engine, request):
    events = [event async for event in engine.generate(request)]
    return [token for event in events for token in event.tokens], events[-1].finish


def test_streams_that_run_together_are_the_answers_of_the_core(make_engine, prompts, greedy, run):
    expected = [d.tokens for d in run(make_engine(), [greedy(p) for p in prompts])]

    async def use(engine):
        return await asyncio.gather(*(collect(engine, greedy(p)) for p in prompts))

    assert with_engine(make_engine(), use) == [(tokens, FinishReason.LENGTH) for tokens in expected]


def test_a_client_that_goes_away_frees_its_place(make_engine, greedy):
    async def use(engine):
        stream = engine.generate(greedy([5, 6, 7], new=4000))
        await anext(stream)
        assert engine.stats().running == 1
        await stream.aclose()
        await until(lambda: engine.stats().running == 0)
        assert engine.stats().cache_tokens_used == 0
        assert await collect(engine, greedy([5], new=2))

    with_engine(make_engine(cache_tokens=8192), use)


async def until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_abort_ends_the_stream_without_a_last_event(make_engine, greedy):
    async def use(engine):
        request = greedy([5, 6, 7], new=4000)
        stream = engine.generate(request)
        await anext(stream)
        await engine.abort(request.id)
        rest = [event async for event in stream]
        assert all(event.finish is None for event in rest)
        await engine.abort("unknown")

    with_engine(make_engine(cache_tokens=8192), use)


def test_adapters_come_and_go_while_others_are_answered(make_engine, peft_adapters, greedy):
    first, second, _ = peft_adapters("llama")

    async def use(engine):
        steady = asyncio.create_task(collect(engine, greedy([5, 6, 7], new=300)))
        with pytest.raises(AdapterNotLoaded):
            await collect(engine, greedy([5], "sha256:a"))
        await engine.load_adapter("sha256:a", first)
        await engine.load_adapter("sha256:b", second)
        with_a, with_b = await asyncio.gather(*(collect(engine, greedy([5], d)) for d in ("sha256:a", "sha256:b")))
        assert with_a != with_b
        stream = engine.generate(greedy([5], "sha256:a", new=1000))
        await anext(stream)
        with pytest.raises(AdapterInUse):
            await engine.unload_adapter("sha256:a")
        await stream.aclose()
        await engine.unload_adapter("sha256:a")
        await engine.unload_adapter("sha256:a")
        assert engine.stats().adapters == ("sha256:b",)
        assert len((await steady)[0]) == 300

    with_engine(make_engine(), use)


def test_a_bad_adapter_or_request_is_its_callers_alone(make_engine, greedy, tmp_path):
    async def use(engine):
        steady = asyncio.create_task(collect(engine, greedy([5, 6, 7], new=100)))
        with pytest.raises(AdapterError):
            await engine.load_adapter("sha256:a", tmp_path)
        with pytest.raises(InvalidRequest):
            await collect(engine, greedy([]))
        assert len((await steady)[0]) == 100

    with_engine(make_engine(), use)


def test_a_failed_step_raises_in_every_stream(make_engine, greedy, monkeypatch):
    core = make_engine()

    def fails(*_):
        raise MemoryError("no more")

    async def use(engine):
        with monkeypatch.context() as patch:
            patch.setattr(core.network, "hidden", fails)
            ended = await asyncio.gather(*(collect(engine, greedy([n])) for n in (5, 6)), return_exceptions=True)
        assert {type(error) for error in ended} == {StepFailed}
        assert (await collect(engine, greedy([5])))[1] is FinishReason.LENGTH

    with_engine(core, use)


def test_a_client_that_goes_away_before_it_was_heard_leaves_nothing(make_engine, greedy):
    async def use(engine):
        steady = asyncio.create_task(collect(engine, greedy([5, 6, 7], new=200)))
        for n in range(20):
            task = asyncio.create_task(collect(engine, greedy([5, 6], new=1000)))
            await asyncio.sleep(0.0002 * n)
            task.cancel()
        assert len((await steady)[0]) == 200
        await until(lambda: engine.stats().running + engine.stats().waiting == 0)

    with_engine(make_engine(), use)


def test_a_refused_request_with_anothers_id_does_not_end_the_other(make_engine, greedy):
    async def use(engine):
        request = greedy([5, 6, 7], new=200)
        first = asyncio.create_task(collect(engine, request))
        await until(lambda: engine.stats().running == 1)
        with pytest.raises(InvalidRequest, match="is being answered"):
            await collect(engine, request)
        assert len((await first)[0]) == 200

    with_engine(make_engine(), use)


@pytest.mark.parametrize("death", [RuntimeError("a defect"), SystemExit()])
def test_a_thread_that_dies_ends_every_stream_and_is_told_of(make_engine, greedy, monkeypatch, death):
    async def main():
        core, told = make_engine(), []
        engine = LocalEngine(core, died=lambda: told.append(True))
        streams = [engine.generate(greedy([5, 6, 7], new=4000)) for _ in range(2)]
        for stream in streams:
            await anext(stream)

        def die():
            raise death

        monkeypatch.setattr(core, "step", die)
        for stream in streams:
            with pytest.raises(EngineStopped):
                [event async for event in stream]
        with pytest.raises(EngineStopped):
            await anext(engine.generate(greedy([5, 6, 7])))
        await until(lambda: not engine.alive)
        assert told == [True]
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), timeout=60))


def test_an_engine_that_is_closed_did_not_die(make_engine):
    async def main():
        told = []
        await LocalEngine(make_engine(), died=lambda: told.append(True)).close()
        assert told == []

    asyncio.run(asyncio.wait_for(main(), timeout=60))


def test_closing_ends_streams_and_refuses_new_ones(make_engine, greedy):
    async def use(engine):
        stream = engine.generate(greedy([5, 6, 7], new=4000))
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineStopped):
            async for _ in stream:
                pass
        with pytest.raises(EngineStopped):
            await collect(engine, greedy([5]))

    with_engine(make_engine(cache_tokens=8192), use)


def test_adapters_change_places_all_of_them_or_none(make_engine, peft_adapters, greedy):
    core = make_engine(max_adapters=2)
    a, b, c = (prepared(core, directory) for directory in peft_adapters("llama"))

    async def use(engine):
        await engine.swap_adapters({"sha256:a": a, "sha256:b": b}, [])
        alone = await collect(engine, greedy([5], "sha256:a"))
        with pytest.raises(NoFreeSlot):
            await engine.swap_adapters({"sha256:c": c}, [])
        stream = engine.generate(greedy([5], "sha256:b", new=1000))
        await anext(stream)
        with pytest.raises(AdapterInUse):
            await engine.swap_adapters({"sha256:c": c}, ["sha256:a", "sha256:b"])
        assert engine.stats().adapters == ("sha256:a", "sha256:b")
        await stream.aclose()
        await engine.swap_adapters({"sha256:c": c, "sha256:a": c}, ["sha256:b"])
        assert engine.stats().adapters == ("sha256:a", "sha256:c")
        assert await collect(engine, greedy([5], "sha256:a")) == alone, "what is installed already stays as it is"

    with_engine(core, use)


def prepared(core, directory):
    config, tensors = read_adapter(directory)
    return prepare(config, tensors, core.network.places, core.network.dtype, str(directory))


def test_an_adapter_that_the_networks_dtype_cannot_hold_is_refused(make_engine, peft_adapters):
    config, tensors = read_adapter(peft_adapters("llama")[1])
    name = max(tensors)
    tensors[name] = tensors[name].double() * 1e300
    with pytest.raises(AdapterError, match="not finite") as caught:
        prepare(config, tensors, make_engine().network.places, torch.float32, "a")
    assert caught.value.context["check"] == "finite"
