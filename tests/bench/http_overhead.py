"""What HTTP, the gateway and Ray Serve cost: 16 clients' streams beside the engine alone, and the first token of one request.

SmolLM2-135M, 16 requests at once over 8 rank-8 adapters, 64 new tokens each. One side is the real application on Ray
Serve (`serving.app`: proxy, gateway, handle, engine replica), its engine's replica on the first core with one thread and
all else (clients, proxy, gateway, Ray) on the last; the other is the same engine in a process of its own on the first core,
without HTTP and without Ray. Both are up all the while and answer the same conversations in turn, each pair other ones so
that no cache of prefixes helps, and the two change places from pair to pair.
One request alone is the same again and again: its prompt is in the cache, so that the engine's own time is short, and its
noise does not hide what is added.

The last line is `http_overhead ratio=… first_token_added_ms=… http=… engine=…`: tokens a second over HTTP by the engine's own,
median over the pairs, and what HTTP adds to the first token of a request that is alone, median likewise. The lines before
it say what CPU time each process took, in milliseconds for each token.

Needs two idle cores and 4 GB of memory; about two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from sides.running import BUILD, Conversation, Result
from sides.setting_up import base_model, questions

REQUESTS, ADAPTERS, RANK, NEW_TOKENS = 16, 8, 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ones", type=int, default=60, help="pairs of a request that is alone")
    parser.add_argument("--model", type=Path, help="directory of the base model; default: SmolLM2-135M-Instruct")
    options = parser.parse_args()
    model = options.model or base_model()
    asked = questions(REQUESTS * (options.pairs + 1) + 1)
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {last})  # what is started from here on inherits it
    case = {
        "model": str(model),
        "home": str(BUILD / "http_overhead"),
        "adapters": ADAPTERS,
        "rank": RANK,
        "core": first,
    }
    with Conversation("http_served.py", case) as served:
        place = served.hear()
        with Conversation("http_engine.py", case | {"digests": place["digests"], "digest": place["base"]}) as engine:
            engine.hear()
            asyncio.run(measure(Sides(place, engine), asked, options))


@dataclass
class Sides:
    place: Result
    """Where the application is: `url`, `key`, `models` (public names, one an adapter) and `digests` of the same adapters."""
    engine: Conversation

    async def http(self, texts: list[str], tokens: int) -> tuple[float, float]:
        """Seconds until the first token of the last to get one, and until all is answered."""
        models = [self.place["models"][n % ADAPTERS] for n in range(len(texts))]
        clients = [await Client.connect(self.place) for _ in texts]
        start = time.perf_counter()
        firsts = await asyncio.gather(*(c.ask(m, t, tokens) for c, m, t in zip(clients, models, texts, strict=True)))
        end = time.perf_counter()
        for client in clients:
            client.close()
        return max(firsts) - start, end - start

    async def alone(self, texts: list[str], tokens: int) -> tuple[float, float]:
        digests = [self.place["digests"][n % ADAPTERS] for n in range(len(texts))]
        self.engine.say({"texts": texts, "digests": digests, "tokens": tokens})
        heard = await asyncio.to_thread(self.engine.hear)
        return heard["first"], heard["seconds"]


async def measure(sides: Sides, texts: list[str], options: argparse.Namespace) -> None:
    asked = iter(texts)

    def some(count: int) -> list[str]:
        return [next(asked) for _ in range(count)]

    warming = some(REQUESTS)
    for side in (sides.http, sides.alone):
        await side(warming, NEW_TOKENS)
    ratios: list[float] = []
    added: list[float] = []
    speeds: dict[str, list[float]] = {"http": [], "alone": []}
    spent: dict[str, list[dict[str, float]]] = {"http": [], "alone": []}
    for pair in range(options.pairs):
        cut, seconds = some(REQUESTS), {}
        for name in in_turn(pair):
            before = cpu_seconds()
            _, seconds[name] = await getattr(sides, name)(cut, NEW_TOKENS)
            spent[name].append({process: s - before.get(process, 0.0) for process, s in cpu_seconds().items()})
            speeds[name].append(REQUESTS * NEW_TOKENS / seconds[name])
        ratios.append(seconds["alone"] / seconds["http"])
        print(f"pair {pair + 1}: {speeds['http'][-1]:.1f} tokens/s over HTTP, {speeds['alone'][-1]:.1f} the engine alone, "
              f"ratio {ratios[-1]:.3f}", flush=True)  # fmt: skip
    one = some(1)
    for side in (sides.http, sides.alone):
        await side(one, 2)
    for pair in range(options.ones):
        seconds = {}
        for name in in_turn(pair):
            seconds[name], _ = await getattr(sides, name)(one, 2)
        added.append((seconds["http"] - seconds["alone"]) * 1e3)
    for name, shown in (("http", "over HTTP"), ("alone", "alone")):
        print(f"CPU milliseconds a token, {shown}: {a_token(spent[name])}")
    tenths = statistics.quantiles(added, n=10)
    print(f"first token of one request, ms over HTTP more than alone: {tenths[0]:.1f} to {tenths[-1]:.1f} for 8 of 10")
    print(f"http_overhead ratio={statistics.median(ratios):.3f} first_token_added_ms={statistics.median(added):.1f} "
          f"http={statistics.median(speeds['http']):.1f} engine={statistics.median(speeds['alone']):.1f}")  # fmt: skip


def in_turn(pair: int) -> tuple[str, str]:
    return ("http", "alone") if pair % 2 else ("alone", "http")


class Client:
    """One client of the API with a connection of its own: as little as can be, since it shares a core with what is measured."""

    def __init__(self, place: Result, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._place, self._reader, self._writer = place, reader, writer

    @staticmethod
    async def connect(place: Result) -> Client:
        url = urlsplit(place["url"])
        return Client(place, *await asyncio.open_connection(url.hostname, url.port))

    async def ask(self, model: str, text: str, tokens: int) -> float:
        """When the first token came; returns when the answer is complete."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self._place['key']}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        self._writer.write(head.encode() + content)
        answer, first = bytearray(), 0.0
        while not answer.endswith(b"\r\n0\r\n\r\n"):  # the last chunk
            piece = await self._reader.read(65536)
            answer += piece
            if not first and b"data: " in answer:
                first = time.perf_counter()
            if not piece or not answer.startswith(b"HTTP/1.1 200"[: len(answer)]):
                raise SystemExit(f"The application answered: {answer.decode()[-2000:]}")
        if f'"completion_tokens":{tokens},'.encode() not in answer or b"data: [DONE]" not in answer:
            raise SystemExit(f"An answer is not complete: {answer.decode()[-2000:]}")
        return first

    def close(self) -> None:
        self._writer.close()


# --- where the time goes --------------------------------------------------------------------------------------------


def cpu_seconds() -> dict[str, float]:
    """CPU time so far of what takes part, by what it is."""
    found: dict[str, float] = {}
    for process in (ourselves := psutil.Process(), *ourselves.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            words, times = " ".join(process.cmdline()), process.cpu_times()
            name = next((name for name, part in PROCESSES.items() if part in words), "the rest")
            found[name] = found.get(name, 0.0) + times.user + times.system
    return found


PROCESSES = {
    "clients": "bench/http_overhead.py",
    "engine": "sides/http_engine.py",
    "engine's replica": "ServeReplica:adaptory:engine",
    "gateway": "ServeReplica:adaptory:gateway",
    "proxy": "Proxy",
    "haproxy": "haproxy",
    "controller": "ServeController",
    "raylet": "raylet/raylet",
    "gcs": "gcs_server",
}
"""By a part of their command line."""


def a_token(spent: list[dict[str, float]]) -> str:
    tokens = REQUESTS * NEW_TOKENS
    medians = {name: statistics.median(one.get(name, 0.0) for one in spent) for name in (*PROCESSES, "the rest")}
    return ", ".join(f"{name} {1e3 * s / tokens:.2f}" for name, s in medians.items() if s)


if __name__ == "__main__":
    main()
