"""Items of answers on both their ways, over real sockets; only Serve's part is played. About two seconds, most of it imports."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from ray.exceptions import ActorDiedError

from orchestrator.errors import ReplicaUnavailable, StepFailed
from serving import mail
from serving.engine.protocol import FinishReason, GenerateRequest, TokenEvent, Usage
from serving.handles import HandleEngine
from serving.mail import Couriers, Mail, Postbox, ReplyTo
from serving.wire import Begun, Item

T = TypeVar("T")
REQUEST = GenerateRequest((1, 2, 3))
FIRST, SECOND = TokenEvent((1,), "a"), TokenEvent((2,), "b")
LAST = TokenEvent((3,), "c", FinishReason.STOP, Usage(3, 0, 3))
ANSWER = [Begun("r1", FIRST), SECOND, LAST]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="am", dir="/tmp") as made:  # a socket's path has at most 107 characters
        yield Path(made)


@dataclass
class Replica:
    """What a handle calls: its items go where the caller says, what is left over comes back as Serve's stream does."""

    script: list[Any]
    couriers: Couriers = field(default_factory=Couriers)
    through_serve: list[Item] = field(default_factory=list)
    cancelled: bool = False
    together: asyncio.Event | None = None
    """What the script's `wait` waits for."""

    def options(self, **_: Any) -> Replica:
        return self

    @property
    def answer(self) -> Replica:
        return self

    def remote(self, request: GenerateRequest, stream: bool, reply_to: ReplyTo | None = None) -> Replica:
        assert stream == (reply_to is not None)
        self._items = self.couriers.deliver(self._play(), reply_to)
        return self

    def __aiter__(self) -> Replica:
        return self

    async def __anext__(self) -> Item:
        item = await anext(self._items)
        self.through_serve.append(item)
        return item

    def cancel(self) -> None:
        self.cancelled = True

    async def _play(self) -> AsyncGenerator[Item, None]:
        for item in self.script:
            if item == "wait":
                assert self.together is not None
                await self.together.wait()
            elif isinstance(item, Exception) and not hasattr(item, "code"):
                raise item
            else:
                yield item


def run(what: Callable[[], Awaitable[T]]) -> T:
    return asyncio.run(asyncio.wait_for(what(), timeout=20))


async def opened(directory: Path) -> Postbox:
    postbox = Postbox(directory / "p")
    await postbox.open()
    return postbox


async def collected(postbox: Postbox, replica: Replica, *, stream: bool = True) -> list[TokenEvent]:
    running = await HandleEngine(replica, postbox=postbox).begin(REQUEST, stream=stream)
    assert running.replica == "r1"
    return [event async for event in running.events]


def test_items_go_to_the_postbox_and_nothing_through_serve(directory: Path):
    async def ask() -> None:
        replica = Replica(ANSWER)
        assert await collected(await opened(directory), replica) == [FIRST, SECOND, LAST]
        assert replica.through_serve == []

    run(ask)


def test_what_one_step_brought_to_many_answers_is_one_frame(directory: Path, monkeypatch: pytest.MonkeyPatch):
    frames = []
    make = mail.frame
    monkeypatch.setattr(mail, "frame", lambda *parts: frames.append(parts) or make(*parts))

    async def ask() -> None:
        postbox, couriers, step = await opened(directory), Couriers(), asyncio.Event()
        replicas = [Replica([Begun("r1", FIRST), "wait", LAST], couriers, together=step) for _ in range(16)]
        asked = [asyncio.create_task(collected(postbox, replica)) for replica in replicas]
        await asyncio.sleep(0.2)
        frames.clear()
        step.set()
        assert await asyncio.gather(*asked) == [[FIRST, LAST]] * 16
        assert len(frames) == 1

    run(ask)


def test_a_replica_that_cannot_reach_the_postbox_answers_through_serve(directory: Path):
    async def ask() -> None:
        postbox = await opened(directory)
        postbox.close()
        replica = Replica(ANSWER)
        assert await collected(postbox, replica) == [FIRST, SECOND, LAST]
        assert replica.through_serve == ANSWER

    run(ask)


def test_a_whole_answer_comes_through_serve(directory: Path):
    async def ask() -> None:
        replica = Replica([Begun("r1", LAST)])
        assert await collected(await opened(directory), replica, stream=False) == [LAST]

    run(ask)


@pytest.mark.parametrize("error", [StepFailed("failed"), ActorDiedError()])
def test_errors_come_through_serve_after_what_was_said(directory: Path, error: Exception):
    async def ask() -> None:
        moment = asyncio.Event()
        replica = Replica([Begun("r1", FIRST), SECOND, "wait", error], together=moment)
        running = await HandleEngine(replica, postbox=await opened(directory)).begin(REQUEST, stream=True)
        assert [await anext(running.events), await anext(running.events)] == [FIRST, SECOND]
        moment.set()
        with pytest.raises(StepFailed if isinstance(error, StepFailed) else ReplicaUnavailable):
            await anext(running.events)

    run(ask)


def test_items_may_come_after_serve_has_told_of_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mail, "_LATE_SECONDS", 1.0)

    async def ask() -> None:
        late = Mail(Replica([]).remote(REQUEST, False))
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.05, late.put, LAST)
        assert await anext(late) == LAST
        with pytest.raises(StopAsyncIteration):
            await anext(late)

    run(ask)


def test_items_of_one_answer_never_reach_another(directory: Path):
    async def ask() -> None:
        postbox, couriers = await opened(directory), Couriers()
        others = [TokenEvent((n,), str(n), FinishReason.STOP, Usage(1, 0, 1)) for n in range(20)]
        asked = [collected(postbox, Replica([Begun("r1", FIRST), last], couriers)) for last in others]
        assert await asyncio.gather(*asked) == [[FIRST, last] for last in others]

    run(ask)


def test_who_goes_away_has_the_call_cancelled_and_its_late_items_are_nobodys(directory: Path):
    async def ask() -> None:
        postbox, moment = await opened(directory), asyncio.Event()
        replica = Replica([Begun("r1", FIRST), "wait", SECOND, LAST], together=moment)
        running = await HandleEngine(replica, postbox=postbox).begin(REQUEST, stream=True)
        await running.close()
        assert replica.cancelled
        del running
        moment.set()
        assert await collected(postbox, Replica(ANSWER)) == [FIRST, SECOND, LAST]

    run(ask)


def test_a_gateway_that_is_gone_ends_the_answer(directory: Path):
    async def deliver() -> None:
        moment, gone = asyncio.Event(), asyncio.Event()

        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.abort()
            gone.set()

        await asyncio.start_unix_server(hang_up, directory / "p")
        play = Replica([SECOND, "wait", *[SECOND] * 1000], together=moment)
        items = Couriers().deliver(play._play(), ReplyTo(str(directory / "p"), 1))
        first = asyncio.create_task(anext(items))
        await gone.wait()
        await asyncio.sleep(0.05)
        moment.set()
        assert isinstance(await first, ReplicaUnavailable)
        assert [item async for item in items] == []

    run(deliver)


def test_a_postbox_that_is_opened_again_is_found(directory: Path):
    async def ask() -> None:
        couriers, postbox = Couriers(), await opened(directory)
        await collected(postbox, Replica(ANSWER, couriers))
        (await couriers._to(str(directory / "p")))._writer.close()  # type: ignore[union-attr]
        replica = Replica(ANSWER, couriers)
        assert await collected(postbox, replica) == [FIRST, SECOND, LAST]
        assert replica.through_serve == []

    run(ask)
