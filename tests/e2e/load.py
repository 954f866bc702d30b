"""Clients that ask on and on while something breaks, and what each of their requests came to."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import requests

from tests.e2e.endpoint import Endpoint


@dataclass(frozen=True)
class Outcome:
    tenant: str
    seed: int
    stream: bool
    status: int | None
    """None: no answer, the connection was lost."""
    text: str
    """Of the answer, as far as it came."""
    end: str
    """`done`: all of it came, and says so; else the code of the error that ended it, `lost` with the connection, or `cut`: a
    stream that ended as if it were complete, without its `[DONE]`."""
    began: float
    ended: float
    """By `time.monotonic`."""
    replica: str | None = None
    client: int = 0


@dataclass
class Load:
    """So many threads, each a client that asks for one answer after the other.

    Args:
        answers: of each tenant: seeds, and what its adapter says with them, `tokens` long.
    """

    endpoint: Endpoint
    answers: dict[str, dict[int, str]]
    tokens: int
    clients: int = 6
    outcomes: list[Outcome] = field(default_factory=list)
    streaming: dict[int, tuple[str, float]] = field(default_factory=dict)
    """By client: the replica that writes its stream now, and when its first words came, by `time.monotonic`."""
    _ending: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        for number in range(self.clients):
            thread = threading.Thread(target=self._run, args=(number,), daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a client still waits for its answer"

    def goes_on(self, count: int = 6, seconds: float = 60.0) -> None:
        """Wait until so many more requests that began after this call have succeeded."""
        start = time.monotonic()
        while sum(o.began > start and o.end == "done" for o in list(self.outcomes)) < count:
            assert time.monotonic() - start < seconds, f"nothing is answered any more: {self.outcomes[-5:]}"
            time.sleep(0.05)

    def stream_begins_on(self, replicas: Collection[str], seconds: float = 60.0) -> str:
        """Wait until one of these replicas has just begun to write a stream; its name."""
        start = time.monotonic()
        while True:
            for replica, began in list(self.streaming.values()):
                if replica in replicas and began > start:
                    return replica
            assert time.monotonic() - start < seconds, f"no stream begins on any of {replicas}: {self.outcomes[-5:]}"
            time.sleep(0.005)

    def wrong(self) -> list[Outcome]:
        """Answers that are not what the adapter says: another text, or a part of it that claims to be all."""
        return [o for o in self.outcomes if not self._right(o)]

    def failed(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.end != "done"]

    def _right(self, outcome: Outcome) -> bool:
        text = self.answers[outcome.tenant][outcome.seed]
        return outcome.text == text if outcome.end == "done" else text.startswith(outcome.text)

    def _run(self, number: int) -> None:
        tenants = sorted(self.answers)
        tenant, stream = tenants[number % len(tenants)], number // len(tenants) % 2 == 0
        for seed in itertools.cycle(self.answers[tenant]):
            if self._ending.is_set():
                return
            outcome = self._ask(number, tenant, seed, stream)
            while outcome.status == 429 and not self._ending.is_set():  # as OpenAI's client does, a few times
                time.sleep(0.2)
                outcome = self._ask(number, tenant, seed, stream)
            if outcome.status == 429:
                return
            self.outcomes.append(replace(outcome, client=number))
            if outcome.status is None or outcome.status >= 500:  # as OpenAI's client does before it asks again
                time.sleep(0.5)

    def _ask(self, number: int, tenant: str, seed: int, stream: bool) -> Outcome:
        def begun(replica: str) -> None:
            self.streaming[number] = replica, time.monotonic()

        try:
            return ask(self.endpoint, tenant, seed, self.tokens, stream=stream, begun=begun)
        finally:
            self.streaming.pop(number, None)


def ask(
    endpoint: Endpoint,
    tenant: str,
    seed: int,
    tokens: int,
    *,
    stream: bool,
    begun: Callable[[str], None] = lambda _: None,
    **fields: Any,
) -> Outcome:
    """One request. `begun` is called with the replica's name at the first words of a stream."""
    began, status, parts, end, replica = time.monotonic(), None, [], "lost", None
    try:
        fields = {"temperature": 1.0, "seed": seed, "max_tokens": tokens, "stream": stream} | fields
        with endpoint.ask(tenant, **fields) as response:
            status, replica = response.status_code, response.headers.get("x-adaptory-replica")
            if status != 200:
                end = _code(response)
            elif not stream:
                parts, end = [response.json()["choices"][0]["message"]["content"]], "done"
            else:
                for chunk in chunks(response):
                    if chunk is None:
                        end = "done"
                    elif "error" in chunk:
                        end = chunk["error"]["code"]
                    else:
                        parts.append(chunk["choices"][0]["delta"].get("content", ""))
                        if replica and len(parts) == 1:
                            begun(replica)
                if end == "lost":
                    end = "cut"
    except requests.RequestException:
        pass
    return Outcome(tenant, seed, stream, status, "".join(parts), end, began, time.monotonic(), replica)


def chunks(response: requests.Response) -> Iterator[dict[str, Any] | None]:
    """Of a stream; None for its `[DONE]`."""
    for line in response.iter_lines():
        if line:
            data = line.decode().removeprefix("data: ")
            yield None if data == "[DONE]" else json.loads(data)


def _code(response: requests.Response) -> str:
    """Of an error; Serve's own proxy has none."""
    try:
        return response.json()["error"]["code"]
    except ValueError:
        return "plain"
