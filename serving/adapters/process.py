"""The loader's process as the replica sees it: digests go out, prepared adapters come back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedReader
from typing import cast

import torch

from orchestrator.errors import AdapterUnavailable
from serving.adapters.disk import DiskMetrics
from serving.adapters.loader import Fetched, LoaderSettings
from serving.engine.prepared import Prepared

log = logging.getLogger(__name__)


class _LoaderDied(Exception):
    """Before it had answered."""


@dataclass(frozen=True)
class Loaded:
    """An adapter in memory, ready to be installed."""

    prepared: Prepared
    from_store: bool
    """Otherwise it was on the disk."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.prepared.size


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    reader: threading.Thread = field(init=False)
    waiting: dict[int, Future[Loaded]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: bool = False
    """It is dead or about to be; nobody reads further replies."""


class LoaderProcess:
    """Starts `serving.adapters.worker` on first use or by `start`, and again after it has died.

    Args:
        patience: seconds for one load, after which the process is taken for stuck and replaced.
        pinned: receive into page-locked memory, from which a GPU copies faster.
    """

    def __init__(self, settings: LoaderSettings, patience: float = 120.0, pinned: bool = False):
        self.settings, self.patience, self.pinned = settings, patience, pinned
        self.starts = 0
        self.disk = DiskMetrics()
        """What the processes so far did on the disk tier."""
        self._ended = DiskMetrics()
        self._child: _Child | None = None
        self._numbers = itertools.count()
        self._starting = threading.Lock()
        self._closed = False

    async def start(self) -> None:
        """Have the process ready; it needs some seconds to import what it needs."""
        await asyncio.to_thread(self._running)

    async def load(self, digest: str) -> Loaded:
        """A process that dies meanwhile is replaced, and asked again: once, for it may be this adapter that kills it.

        Raises:
            AdapterError: refused; the `check` says why.
            StoreError: not on the disk, and the store cannot be read.
            AdapterUnavailable: no room, or the process died or hung.
        """
        try:
            return await self._load(digest)
        except _LoaderDied:
            log.warning("%s is asked of another loader", digest)
        try:
            return await self._load(digest)
        except _LoaderDied as error:
            raise _unavailable(digest, "was not loaded: the loader died, and another one, too") from error

    async def _load(self, digest: str) -> Loaded:
        child, number = await asyncio.to_thread(self._ask, digest)
        try:
            async with asyncio.timeout(self.patience):
                return await asyncio.wrap_future(child.waiting[number])
        except TimeoutError:
            self._kill(child)
            raise _unavailable(digest, f"was not loaded within {self.patience:.0f} s") from None
        finally:
            child.waiting.pop(number, None)

    async def close(self) -> None:
        with self._starting:
            self._closed = True
            child, self._child = self._child, None
        if child is not None:
            self._kill(child)
            await asyncio.to_thread(child.reader.join)

    # details

    def _ask(self, digest: str) -> tuple[_Child, int]:
        child, number = self._running(), next(self._numbers)
        child.waiting[number] = Future()
        try:
            with child.lock:
                assert child.process.stdin is not None
                pickle.dump((number, digest), child.process.stdin)
                child.process.stdin.flush()
            if child.ended:
                raise BrokenPipeError
        except OSError as error:
            child.waiting.pop(number, None)
            raise _LoaderDied from error
        return child, number

    def _running(self) -> _Child:
        with self._starting:
            if self._closed:
                raise AdapterUnavailable("The adapters' loader is shut down.", hint="Ask another replica.")
            if self._child is None or self._child.ended or self._child.process.poll() is not None:
                self._child = self._started()
            return self._child

    def _started(self) -> _Child:
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.adapters.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )
        assert process.stdin is not None
        with suppress(OSError):  # died at once: the reader says so
            pickle.dump(self.settings, process.stdin)
            process.stdin.flush()
        self.starts += 1
        self._ended = self.disk
        child = _Child(process)
        child.reader = threading.Thread(target=self._read, args=(child,), name="adapters", daemon=True)
        child.reader.start()
        return child

    def _read(self, child: _Child) -> None:
        """Replies until the process ends; who still waits then is told."""
        stream = cast(BufferedReader, child.process.stdout)
        try:
            while True:
                number, reply = pickle.load(stream)  # noqa: S301 - from our own child, which unpickles nothing foreign
                result = self._received(stream, reply) if isinstance(reply, Fetched) else reply
                waiting = child.waiting.get(number)
                if waiting is None or not waiting.set_running_or_notify_cancel():
                    continue
                if isinstance(result, Loaded):
                    waiting.set_result(result)
                else:
                    waiting.set_exception(result)
        except (EOFError, OSError, pickle.UnpicklingError):
            pass
        except Exception:  # a defect; whoever waits must hear of it all the same
            log.exception("a reply of the adapters' loader cannot be read")
        self._kill(child)
        status = child.process.wait()
        if not self._closed:
            log.warning("the adapters' loader ended with status %s", status)
        for waiting in list(child.waiting.values()):
            if waiting.set_running_or_notify_cancel():
                waiting.set_exception(_LoaderDied())
        for pipe in (child.process.stdin, child.process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()

    def _received(self, stream: BufferedReader, fetched: Fetched) -> Loaded:
        self.disk = self._ended.plus(fetched.disk)
        buffer = torch.empty(fetched.numbers, dtype=self.settings.requirements.dtype, pin_memory=self.pinned)
        rest = buffer.view(torch.uint8).numpy().data
        while rest:
            if not (count := stream.readinto(rest)):
                raise EOFError
            rest = rest[count:]
        return Loaded(Prepared(fetched.pieces, buffer), fetched.from_store)

    def _kill(self, child: _Child) -> None:
        child.ended = True
        with suppress(OSError):
            child.process.kill()


def _unavailable(digest: str, what: str) -> AdapterUnavailable:
    return AdapterUnavailable(f"The adapter {digest} {what}.", hint="Ask again.", adapter=digest)
