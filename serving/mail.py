"""Tokens on their way from an engine's replica to a gateway on the same machine: one message for all that a step brought.

A request goes through Serve, which chooses the replica, counts the request while it runs, carries its cancellation and
tells of the replica's death. But each item that comes back through Serve costs the replica's core half a millisecond, as
much for one token as for a thousand (measured, `tests/bench/http_overhead.py`). So a gateway says where its postbox is, and
a replica that can reach it sends the items there; errors, and all items of a replica on another machine, come through Serve.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from orchestrator.errors import AdaptoryError, ReplicaUnavailable
from serving.meeting import frame, meeting_place, read_frame, sweep
from serving.wire import Item

log = logging.getLogger(__name__)

_SUFFIX = ".tokens"
_ITEMS = b"i"
_LATE_SECONDS = 5.0
"""For items that were sent before Serve told that the answer is over."""
_MOST_UNSENT = 64 << 20
"""Bytes for a gateway that does not read them."""


@dataclass(frozen=True)
class ReplyTo:
    postbox: str
    """Path of a socket; no other machine has one of this name."""
    number: int
    """Of the answer."""


# --- the gateway's end ----------------------------------------------------------------------------------------------


async def open_postbox() -> Postbox | None:
    """None where there can be none: items then come Serve's way."""
    try:
        directory = meeting_place()
        sweep(directory, _SUFFIX)
        postbox = Postbox(directory / f"{secrets.token_hex(8)}{_SUFFIX}")
        await postbox.open()
    except OSError as error:
        log.warning("items come through Serve: %s", error)
        return None
    return postbox


class Postbox:
    """Where replicas send items; one a gateway process."""

    def __init__(self, path: Path):
        self._path = path
        self._waiting: WeakValueDictionary[int, Mail] = WeakValueDictionary()
        self._last = 0

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._receive, self._path)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server.close()

    def ask(self, answer: Any, *arguments: Any) -> Mail:
        """Call a method that streams items, by its handle; it is told where to send them.

        Args:
            answer: of Serve's streaming handle.
        """
        self._last += 1
        mail = Mail(answer.remote(*arguments, reply_to=ReplyTo(str(self._path), self._last)))
        self._waiting[self._last] = mail
        return mail

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                _, data = await read_frame(reader)
                for number, item in pickle.loads(data):  # noqa: S301  # only this user's processes reach the socket
                    if (mail := self._waiting.get(number)) is not None:
                        mail.put(item)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the replica is gone, and Serve tells of it
        finally:
            writer.close()


@dataclass(frozen=True)
class _Ended:
    """How Serve's stream ended."""

    error: Exception | None = None


class Mail:
    """The items of one answer, whichever way they come: used like what Serve's handle gives."""

    def __init__(self, items: Any):
        self._items, self._box = items, asyncio.Queue[Item | _Ended]()
        self._ended = False
        self._through_serve = asyncio.create_task(self._watch())

    def put(self, item: Item | _Ended) -> None:
        self._box.put_nowait(item)

    def cancel(self) -> None:
        self._items.cancel()

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        item = await self._next()
        if isinstance(item, _Ended):
            if item.error is not None:
                raise item.error
            self._ended = True
            return await self.__anext__()
        return item

    async def _next(self) -> Item | _Ended:
        if not self._ended:
            return await self._box.get()
        try:
            return await asyncio.wait_for(self._box.get(), _LATE_SECONDS)
        except TimeoutError:
            raise StopAsyncIteration from None

    async def _watch(self) -> None:
        try:
            async for item in self._items:
                self.put(item)
        except Exception as error:
            self.put(_Ended(error))
        except BaseException:
            self.put(_Ended())
            raise
        else:
            self.put(_Ended())


# --- the replica's end ----------------------------------------------------------------------------------------------


class Couriers:
    """A replica's connections to postboxes: one each, opened when something is to be sent there."""

    def __init__(self) -> None:
        self._connecting: dict[str, asyncio.Task[Courier | None]] = {}

    async def deliver(self, items: AsyncGenerator[Item, None], reply_to: ReplyTo | None) -> AsyncGenerator[Item, None]:
        """Sends the items there; what it yields instead is left to Serve."""
        courier = None if reply_to is None else await self._to(reply_to.postbox)
        async for item in items:
            if courier is None or reply_to is None or isinstance(item, AdaptoryError):
                yield item
            elif courier.lost:
                yield ReplicaUnavailable("The gateway's postbox is gone.", hint="Ask again.")
                return
            else:
                courier.send(reply_to.number, item)

    async def _to(self, path: str) -> Courier | None:
        """None if the postbox is on another machine."""
        if (task := self._connecting.get(path)) is None or (task.done() and (found := task.result()) and found.lost):
            task = self._connecting[path] = asyncio.create_task(_connected(path))
        return await asyncio.shield(task)


async def _connected(path: str) -> Courier | None:
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return None
    return Courier(writer)


class Courier:
    """Collects what is sent while the event loop is busy with one step's news, and sends it as one frame."""

    def __init__(self, writer: asyncio.StreamWriter):
        self._writer = writer
        self._collected: list[tuple[int, Item]] = []

    @property
    def lost(self) -> bool:
        return self._writer.is_closing()

    def send(self, number: int, item: Item) -> None:
        if not self._collected:
            asyncio.get_running_loop().call_soon(self._leave)
        self._collected.append((number, item))

    def _leave(self) -> None:
        items, self._collected = self._collected, []
        if self._writer.transport.get_write_buffer_size() > _MOST_UNSENT:
            self._writer.close()
        if not self.lost:
            self._writer.write(frame(_ITEMS, pickle.dumps(items, pickle.HIGHEST_PROTOCOL)))
