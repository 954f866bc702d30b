"""An engine's replicas behind a Serve handle that a test plays. About two seconds, most of it Ray's import."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from orchestrator.errors import AdapterUnavailable, EngineOverloaded, EngineStopped, ReplicaUnavailable, StepFailed
from serving.engine.protocol import FinishReason, GenerateRequest, TokenEvent, Usage
from serving.handles import HandleEngine
from serving.wire import Begun

T = TypeVar("T")
REQUEST = GenerateRequest((1, 2, 3))
FIRST, SECOND = TokenEvent((1,), "a"), TokenEvent((2,), "b")
LAST = TokenEvent((3,), "c", FinishReason.STOP, Usage(3, 0, 3))
DIED = ActorDiedError()


class Items:
    """What `handle.answer.remote` gives: items, and errors that are raised where they stand."""

    def __init__(self, script: list[Any]):
        self.script, self.cancelled = list(script), False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self.script:
            raise StopAsyncIteration
        item = self.script.pop(0)
        if item == "forever":
            await asyncio.sleep(1000)
        if isinstance(item, Exception) and not hasattr(item, "code"):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Handle:
    """Each call is answered by the next script."""

    scripts: list[list[Any]]
    calls: list[Items] = field(default_factory=list)
    asked: list[GenerateRequest] = field(default_factory=list)

    def options(self, *, stream: bool, **_: Any) -> Handle:
        assert stream
        return self

    @property
    def answer(self) -> Handle:
        return self

    def remote(self, request: GenerateRequest, stream: bool) -> Items:
        self.asked.append(request)
        self.calls.append(Items(self.scripts[len(self.calls)]))
        return self.calls[-1]


def run(what: Callable[[], Awaitable[T]]) -> T:
    return asyncio.run(asyncio.wait_for(what(), timeout=20))


def collect(handle: Handle, **options: Any) -> tuple[str, list[TokenEvent]]:
    async def ask() -> tuple[str, list[TokenEvent]]:
        running = await HandleEngine(handle, **options).begin(REQUEST, stream=True)
        events = [event async for event in running.events]
        await running.close()
        return running.replica, events

    return run(ask)


def test_an_answer_with_the_replica_that_gives_it():
    handle = Handle([[Begun("r1", FIRST), SECOND, LAST]])
    assert collect(handle) == ("r1", [FIRST, SECOND, LAST])
    assert not handle.calls[0].cancelled  # there is nothing left to end


def test_a_whole_answer_is_one_item():
    assert collect(Handle([[Begun("r1", LAST)]])) == ("r1", [LAST])


STOPPED = EngineStopped("The engine is shut down.")


@pytest.mark.parametrize("end", [[DIED], [], [STOPPED]])
def test_another_replica_takes_over_while_nothing_was_said(end: list[Any]):
    handle = Handle([end, end, [Begun("r2", FIRST), LAST]])
    assert collect(handle) == ("r2", [FIRST, LAST])
    assert len(handle.calls) == 3
    assert len({request.id for request in handle.asked}) == 3  # one that is out of reach may be answering still
    assert {request.prompt_ids for request in handle.asked} == {REQUEST.prompt_ids}


@pytest.mark.parametrize("end", [DIED, STOPPED])
def test_it_is_not_tried_for_ever(end: Any):
    handle = Handle([[end]] * 5)
    with pytest.raises((ReplicaUnavailable, EngineStopped)):
        collect(handle)
    assert len(handle.calls) == 3


@pytest.mark.parametrize("end", [[DIED], []])
def test_an_answer_that_has_begun_ends_with_an_error(end: list[Any]):
    handle = Handle([[Begun("r1", FIRST), *end], [Begun("r2", FIRST), LAST]])
    with pytest.raises(ReplicaUnavailable, match="is gone"):
        collect(handle)
    assert len(handle.calls) == 1


def test_errors_of_the_engine_come_as_they_are_and_are_not_tried_again():
    for error in (AdapterUnavailable("not now"), StepFailed("failed")):
        handle = Handle([[error]])
        with pytest.raises(type(error)):
            collect(handle)
        with pytest.raises(type(error)):
            collect(Handle([[Begun("r1", FIRST), error]]))


def test_full_replicas():
    with pytest.raises(EngineOverloaded) as caught:
        collect(Handle([[BackPressureError(num_queued_requests=9, max_queued_requests=9)]]))
    assert caught.value.context["everywhere"]


def full(replica: str | None) -> list[Any]:
    return [EngineOverloaded("full", **({} if replica is None else {"replica": replica}))]


def test_where_one_is_full_another_is_asked():
    handle = Handle([full("r1"), full("r2"), [Begun("r3", FIRST), LAST]])
    assert collect(handle, replicas=lambda: ("r1", "r2", "r3", "r4")) == ("r3", [FIRST, LAST])
    assert [request.refused_by for request in handle.asked] == [set(), {"r1"}, {"r1", "r2"}]


@pytest.mark.parametrize(
    ("replicas", "answers", "calls", "everywhere"),
    [
        ("r1", ["r1"], 1, True),
        ("r1 r2", ["r2", "r1"], 2, True),
        ("r1 r2 r3 r4", ["r1", "r2", "r3"], 3, False),  # not all of many
        ("r1 r2", ["r1", "r1"], 2, False),  # the other one could not be reached
        ("r2", ["r1", "r2"], 2, True),  # one that this process does not know of yet
        ("r1 r2", [None, None], 2, False),  # of an older version, in the middle of a deploy
    ],
)
def test_where_all_are_full(replicas: str, answers: list[str | None], calls: int, everywhere: bool):
    handle = Handle([full(replica) for replica in answers])
    with pytest.raises(EngineOverloaded) as caught:
        collect(handle, replicas=replicas.split)
    assert len(handle.calls) == calls
    assert caught.value.context.get("everywhere", False) == everywhere


def test_a_replica_that_never_begins_is_given_up():
    handle = Handle([["forever"]])
    with pytest.raises(ReplicaUnavailable, match="No replica began"):
        collect(handle, patience=0.05)
    assert handle.calls[0].cancelled


@pytest.mark.parametrize("begun", [False, True])
def test_who_goes_away_has_the_replica_abort_it(begun: bool):
    handle = Handle([[Begun("r1", FIRST), "forever"] if begun else ["forever"]])

    async def leave() -> None:
        running = await HandleEngine(handle).begin(REQUEST, stream=True)
        try:
            async for _ in running.events:
                pass
        finally:
            await running.close()

    async def ask() -> None:
        task = asyncio.create_task(leave())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(ask)
    assert handle.calls[0].cancelled
