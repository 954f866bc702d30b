"""The engine of this process: `EngineCore` on a thread of its own, behind asyncio. An `Engine`."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from orchestrator.errors import EngineStopped
from serving.engine.core import Delivery, EngineCore
from serving.engine.prepared import Prepared
from serving.engine.protocol import Backlog, EngineStats, GenerateRequest, TokenEvent

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class _Listener:
    """Where the news of a request go: a queue of an event loop that lives on another thread."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Delivery]


class LocalEngine:
    """Steps while there is work, sleeps while there is none; what others ask of the core is done between two steps.

    Args:
        core: from now on only this engine's thread touches it.
        threads: for torch to compute with; None: as many as the process has cores.
        died: called when its thread ends though nobody closed it, when everybody who waited has been told.
    """

    def __init__(self, core: EngineCore, threads: int | None = None, died: Callable[[], None] | None = None):
        self._core, self._died = core, died
        self._threads = threads or len(os.sched_getaffinity(0))
        self._asked: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._listeners: dict[str, _Listener] = {}  # of the engine's thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        listener = _Listener(asyncio.get_running_loop(), asyncio.Queue())
        format = request.sampling.response_format
        # compiling a schema can take seconds, which no other request shall wait for
        grammar = None if format is None else await asyncio.to_thread(self._core.grammars.matcher, format)

        def add() -> None:
            self._tell(self._core.add(request, grammar))
            self._listeners[request.id] = listener

        ended = False
        try:
            await self._between_steps(add)
            while not ended:
                delivery = await listener.queue.get()
                ended = delivery.last
                if delivery.error is not None:
                    raise delivery.error
                if delivery.event is None:
                    return
                yield delivery.event
        finally:
            if not ended:  # the client went away, maybe while the request was being added
                self._ask(lambda: self._abort(listener, request.id), quietly=True)

    async def abort(self, request_id: str) -> None:
        await self._between_steps(lambda: self._abort(None, request_id))

    async def load_adapter(self, digest: str, directory: Path) -> None:
        if digest not in self._core.network.adapters:
            adapter = await asyncio.to_thread(self._core.network.read, directory)
            await self._between_steps(lambda: self._core.install(digest, adapter))

    async def unload_adapter(self, digest: str) -> None:
        await self._between_steps(lambda: self._core.unload(digest))

    async def swap_adapters(self, install: Mapping[str, Prepared], remove: Collection[str]) -> None:
        """Unload and install several adapters between the same two steps, all of it or nothing.

        Raises:
            AdapterInUse: requests still use one of `remove`.
            NoFreeSlot: there would be too many.
        """
        device = self._core.network.device
        adapters = await asyncio.to_thread(lambda: {digest: p.updates(device) for digest, p in install.items()})
        await self._between_steps(lambda: self._core.swap(adapters, remove))

    def stats(self) -> EngineStats:
        return self._core.stats()

    def backlog(self) -> Backlog:
        return self._core.backlog()

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._thread.is_alive()

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    # the engine's thread

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # is the calling thread's alone
        try:
            while not self._closing:
                for do in self._next():
                    do()
                self._tell(self._core.step())
        except BaseException:  # not of a request, nor of a step: a defect; whatever it is, none may wait for ever
            log.exception("the engine's thread ends")
        with self._wake:
            closed, self._closing = self._closing, True
            left, self._asked = self._asked, []
        self._tell(self._core.fail(lambda request: _stopped(request=request)))
        for do in left:  # each finds the engine closing and says so
            do()
        if self._died is not None and not closed:
            self._died()

    def _next(self) -> list[Callable[[], None]]:
        """What was asked for; waits while there is nothing to do at all."""
        with self._wake:
            while not (self._asked or self._closing or self._core.busy):
                self._wake.wait()
            asked, self._asked = self._asked, []
        return asked

    def _tell(self, deliveries: list[Delivery]) -> None:
        """One call into each event loop for all the news of a step: waking a loop costs more than the news."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Delivery], Delivery]]] = {}
        for delivery in deliveries:
            listener = self._listeners.get(delivery.request_id)
            if listener is None:
                continue
            if delivery.last:
                del self._listeners[delivery.request_id]
            by_loop.setdefault(listener.loop, []).append((listener.queue, delivery))
        for loop, news in by_loop.items():
            _call(loop, _put, news)

    def _abort(self, listener: _Listener | None, request_id: str) -> None:
        """
        Args:
            listener: whose request it must be; a request that was refused may bear the id of another's.
        """
        found = self._listeners.get(request_id)
        if found is not None and listener in (None, found):
            self._core.abort(request_id)
            self._tell([Delivery(request_id, None)])
            self._listeners.pop(request_id, None)

    # from other threads

    def _ask(self, do: Callable[[], None], *, quietly: bool = False) -> None:
        """Have this done on the engine's thread, between two steps.

        Raises:
            EngineStopped: there is no such thread any more, unless `quietly`.
        """
        with self._wake:
            if not self._closing:
                self._asked.append(do)
                self._wake.notify()
            elif not quietly:
                raise _stopped()

    async def _between_steps(self, do: Callable[[], T]) -> T:
        done: Future[T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                if self._closing:
                    raise _stopped()
                done.set_result(do())
            except Exception as error:
                done.set_exception(error)

        self._ask(run)
        return await asyncio.wrap_future(done)


def _put(news: list[tuple[asyncio.Queue[Delivery], Delivery]]) -> None:
    for queue, delivery in news:
        queue.put_nowait(delivery)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop is closed: nobody listens any more
        log.debug("an event loop was closed before its answers ended")


def _stopped(**context: Any) -> EngineStopped:
    return EngineStopped("The engine is shut down.", hint="Ask another replica.", **context)
