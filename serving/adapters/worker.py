"""`python -m serving.adapters.worker`: fetches, checks and prepares adapters, away from the process that serves.

Checking an adapter is hundreds of small steps in Python. In a thread beside the engine's they would hold the interpreter's lock,
which the engine takes anew for each operation of each step. Here nothing waits for them; the replica only receives bytes.

It ends when its standard input ends, so it never outlives the replica, however that dies. Speaks pickles with its parent,
which started it; what it reads from the store is never unpickled.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import torch

from orchestrator.errors import AdapterUnavailable, AdaptoryError
from orchestrator.registry.signing import get_ready
from serving.adapters.loader import Fetched, Loader, LoaderSettings
from serving.engine.prepared import Prepared


def main() -> None:
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    settings: LoaderSettings = pickle.load(requests)  # noqa: S301 - from the parent
    with contextlib.suppress(OSError):
        os.nice(max(0, settings.niceness - os.getpriority(os.PRIO_PROCESS, 0)))
    if settings.requirements.signature is not None:
        get_ready()
    loader, writing = Loader(settings), threading.Lock()

    def work(number: int, digest: str) -> None:
        start = time.monotonic()
        try:
            prepared, from_store = loader.load(digest)
            facts = Fetched(
                prepared.pieces,
                prepared.buffer.numel(),
                from_store,
                time.monotonic() - start,
                loader.disk.metrics,
            )
            reply: Any = (number, facts)
        except AdaptoryError as error:
            prepared, reply = None, (number, error)
        except Exception as error:
            what = f"The adapter {digest} could not be loaded: {type(error).__name__}: {error}"
            prepared, reply = None, (number, AdapterUnavailable(what, adapter=digest))
        with writing:
            pickle.dump(reply, replies)
            if prepared is not None:
                replies.write(_bytes(prepared))
            replies.flush()

    with ThreadPoolExecutor(settings.parallel) as pool:
        while (request := _next(requests)) is not None:
            pool.submit(work, *request)
        os._exit(0)  # the parent is gone: nobody wants what is under way


def _bytes(prepared: Prepared) -> memoryview:
    return prepared.buffer.view(torch.uint8).numpy().data


def _next(requests: BinaryIO) -> tuple[int, str] | None:
    try:
        return pickle.load(requests)  # noqa: S301 - from the parent
    except (EOFError, pickle.UnpicklingError):
        return None


if __name__ == "__main__":
    main()
