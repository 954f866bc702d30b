"""Half an hour of ten times what the engine can do: memory stays flat, what is let in is answered as in a full batch, the rest is 429.

First as many clients as the batch has places, for the latencies of a full batch (a place is empty for a moment whenever an
answer ends); the same beside strangers, who keep all but the engine busy; as many as are let in at all, some of whom wait: no
place is ever empty, and nobody is turned away; then ten times as many clients, who ask again at once when they are turned away:
streaming and whole, of four tenants, for two adapters that are always there and for sixty that are not (the engine holds
eight). Beside them clients that leave in the middle of an answer, that never read it, that send half a body, and routes that
change every few seconds. It is the real application on Ray Serve (proxy, gateway, engine's replica), the engine with one thread
on the first core, all else (clients, proxy, gateway, loader, Ray) on the last.

Compared are requests of the same kind (warm adapters, clients that stay) in all phases. The last line is `soak p95_ratio=…
beside_ratio=… brim_ratio=… memory_growth=… answered=… shed=… unavailable=… failed=…`: `beside_ratio` is overload over a full
batch beside strangers: what is left when the machine has as much to do; `brim_ratio` is overload over as many as are let in;
`memory_growth` is that of the resident memory from the first quarter of the overload to its last, gateway, engine and loader
together; `failed` counts answers that are neither 200, 429 nor 503, and streams that broke off.

Needs two cores and 2 GB of memory (with SmolLM2-135M).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
from sides.running import BUILD, Conversation
from sides.setting_up import base_model, new_adapter

from orchestrator.commands.serving import metrics_key
from orchestrator.settings import load_settings
from serving.replica import PLACES_A_WAITER

HOME = BUILD / "soak"
TENANTS = ("acme", "globex", "initech", "umbrella")
WARM = 2
"""Adapters of each tenant's that are asked for all the time."""
SLOTS = 8
COUNTED = ("steps", "step_seconds", "preemptions", "prompt_tokens", "shared_tokens", "completion_tokens", "cold")
"""Of what the engine counts."""
QUESTION = "Write a long story about a lighthouse keeper who finds a bottle on the beach."


@dataclass
class Seen:
    """What one phase has shown."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from the request to the end of its answer, of those that are compared."""
    first: list[float] = field(default_factory=list)
    """To the first token of a stream."""
    results: Counter[str] = field(default_factory=Counter)


@dataclass
class Clients:
    port: int
    keys: dict[str, str]
    models: dict[str, list[str]]
    """Of each tenant: first the warm ones."""
    tokens: int
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    seen: Seen = field(default_factory=Seen)
    over: float = 0.0

    async def asking(self) -> None:
        """Ask, read the answer, ask again; when turned away, after a moment."""
        while time.monotonic() < self.over:
            tenant, chance = self.chance.choice(TENANTS), self.chance.random()
            warm = chance < 0.9
            models = self.models[tenant]
            model = self.chance.choice(models[:WARM] if warm else models[WARM:])
            await self.one(tenant, model, stream=self.chance.random() < 0.5, compared=warm)

    async def one(self, tenant: str, model: str, *, stream: bool, compared: bool) -> None:
        seen, start = self.seen, time.monotonic()
        try:
            status, ended, first = await self.ask(tenant, model, stream)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            seen.results["connection"] += 1
            return
        if status == 200 and ended:
            seen.results["answered"] += 1
            if compared:
                seen.latencies.append(time.monotonic() - start)
                if stream:
                    seen.first.append(first - start)
        elif status == 429:
            seen.results["shed"] += 1
            await asyncio.sleep(self.chance.uniform(0.1, 0.5))  # sooner than they were told
        elif status == 503:
            seen.results["unavailable"] += 1
            await asyncio.sleep(self.chance.uniform(0.1, 0.5))
        else:
            seen.results[f"failed with {status}"] += 1

    async def ask(self, tenant: str, model: str, stream: bool) -> tuple[int, bool, float]:
        """Status, whether the answer is complete, and when its first token was there."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(self.request(tenant, model, stream))
            status = int((await reader.readline()).split()[1])
            await reader.readuntil(b"\r\n\r\n")
            first, body = 0.0, b""
            while data := await reader.read(65_536):
                first = first or time.monotonic()
                body += data
            return status, b"data: [DONE]" in body or (not stream and b'"usage"' in body), first
        finally:
            writer.close()

    def request(self, tenant: str, model: str, stream: bool) -> bytes:
        asked = f"{self.chance.randrange(1000)}: {QUESTION}"
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": asked}], "stream": stream}
        tokens = self.chance.randrange(self.tokens // 2, 3 * self.tokens // 2)
        data = json.dumps(body | {"max_tokens": tokens, "temperature": 1.0}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: soak\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        )
        return f"{head}Authorization: Bearer {self.keys[tenant]}\r\n\r\n".encode() + data

    # odd ones

    async def leaving(self) -> None:
        """In the middle of an answer, or before it began."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(self.request(TENANTS[0], self.chance.choice(self.models[TENANTS[0]]), stream=True))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(100), self.chance.uniform(0, 2))
        writer.transport.abort()

    async def never_reading(self) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        with sock:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            await asyncio.get_running_loop().sock_sendall(
                sock, self.request(TENANTS[1], self.models[TENANTS[1]][0], True)
            )
            await asyncio.sleep(20)

    async def half_a_body(self) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(self.request(TENANTS[2], self.models[TENANTS[2]][0], False)[:-20])
        await asyncio.sleep(self.chance.uniform(0, 5))
        writer.close()

    async def strangers(self) -> None:
        """Ask as often as those who are turned away, with a key that nobody has: the gateway has work, the engine none."""
        while time.monotonic() < self.over:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                tenant = self.chance.choice(TENANTS)
                request = self.request(tenant, self.models[tenant][0], stream=False)
                writer.write(request.replace(self.keys[tenant].encode(), f"ak-{'a' * 12}-{'b' * 43}".encode()))
                while await reader.read(65_536):
                    pass
                writer.close()
            await asyncio.sleep(self.chance.uniform(0.1, 0.5))

    async def guessing(self) -> None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            guess = "".join(self.chance.choices("abcdefgh", k=43))
            writer.write(
                f"GET /v1/models HTTP/1.1\r\nHost: s\r\nAuthorization: Bearer ak-{'a' * 12}-{guess}\r\n\r\n".encode()
            )
            await asyncio.sleep(1)
            writer.close()

    async def often(self, act: Callable[[], Awaitable[None]], seconds: float) -> None:
        while time.monotonic() < self.over:
            with contextlib.suppress(OSError):
                await act()
            await asyncio.sleep(self.chance.uniform(0, 2 * seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes",
        type=float,
        default=30.0,
        help="of overload; a full batch has a tenth of it before, and a minute at least",
    )
    parser.add_argument("--places", type=int, default=8, help="of the batch")
    parser.add_argument("--times", type=int, default=10, help="as many clients as places")
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=48,
        help="of an answer, at most, on average: from half of it to one and a half",
    )
    parser.add_argument("--adapters", type=int, default=60, help="that are not in the engine, of all tenants together")
    parser.add_argument("--model", type=Path, help="directory of the base model; default: SmolLM2-135M-Instruct")
    options = parser.parse_args()
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {last})  # what is started from here on inherits it
    shutil.rmtree(HOME, ignore_errors=True)
    model = options.model or base_model()
    os.environ |= {"ADAPTORY_HOME": str(HOME), "HF_HUB_OFFLINE": "1"}
    key = Path(metrics_key(load_settings())).read_text().strip()
    keys, models, change = tenants(model, options.adapters)
    case = {
        "model": str(model),
        "home": str(HOME),
        "places": options.places,
        "slots": SLOTS,
        "adapter_bytes": 200 << 20,
        "core": first,
    }
    with Conversation("soak_served.py", case) as served:
        place = served.hear()
        clients = Clients(place["port"], keys, models, options.new_tokens)
        asyncio.run(soak(clients, options, Served(place["gateway"], place["engine"], place["port"], key), change))


class Served:
    """The processes whose memory is looked at, and what the engine says of itself."""

    def __init__(self, gateway: int, engine: int, port: int, metrics_key: str):
        self._gateway, self._engine = psutil.Process(gateway), psutil.Process(engine)
        self._port, self._key = port, metrics_key

    def counters(self) -> dict[str, float]:
        """Of the engine, since its start."""
        headers = {"Authorization": f"Bearer {self._key}"}
        told = requests.get(f"http://127.0.0.1:{self._port}/status", headers=headers, timeout=60).json()
        ((replica,),) = (replicas.values() for replicas in told["engines"].values())
        return replica["stats"] | replica["cache"]

    def memory(self) -> dict[str, float]:
        """MB that are resident."""
        loaders = self._engine.children(recursive=True)
        return {
            "gateway": self._gateway.memory_info().rss / 2**20,
            "engine": self._engine.memory_info().rss / 2**20,
            "loader": sum(loader.memory_info().rss for loader in loaders) / 2**20,
        }


async def soak(clients: Clients, options: argparse.Namespace, server: Served, change: Callable[[], None]) -> None:
    for tenant in TENANTS:  # cold once
        for name in clients.models[tenant][:WARM]:
            await clients.one(tenant, name, stream=False, compared=False)
    full, _ = await phase("full batch", clients, server, options.places, max(options.minutes * 6, 60), [])
    beside = [clients.strangers() for _ in range(options.places * (options.times - 1))]
    busy, _ = await phase("beside strangers", clients, server, options.places, max(options.minutes * 6, 60), beside)
    let_in = options.places + max(1, options.places // PLACES_A_WAITER)
    brim, _ = await phase("to the brim", clients, server, let_in, max(options.minutes * 6, 60), [])
    odd = [
        clients.often(clients.leaving, 0.5),
        clients.often(clients.never_reading, 5),
        clients.often(clients.half_a_body, 1),
        clients.often(clients.guessing, 0.2),
        clients.often(lambda: asyncio.to_thread(change), 3),
    ]
    over, memory = await phase("overload", clients, server, options.places * options.times, options.minutes * 60, odd)
    quarter = max(len(memory) // 4, 1)
    growth = statistics.median(memory[-quarter:]) / statistics.median(memory[:quarter]) - 1
    for name, seen in (("full batch", full), ("beside strangers", busy), ("to the brim", brim), ("overload", over)):
        print(f"{name}: answer p50 {part(seen.latencies, 0.5):.2f} s, p95 {part(seen.latencies, 0.95):.2f} s; "
              f"first token p50 {part(seen.first, 0.5):.2f} s, p95 {part(seen.first, 0.95):.2f} s; {dict(seen.results)}")  # fmt: skip
    known = ("answered", "shed", "unavailable")
    counts = " ".join(f"{name}={over.results[name]}" for name in known)
    failed = sum(count for name, count in over.results.items() if name not in known)
    ratio, beside_ratio, brim_ratio = (
        part(over.latencies, 0.95) / part(seen.latencies, 0.95) for seen in (full, busy, brim)
    )
    print(f"soak p95_ratio={ratio:.2f} beside_ratio={beside_ratio:.2f} brim_ratio={brim_ratio:.2f} "
          f"memory_growth={growth:.1%} {counts} failed={failed}")  # fmt: skip


async def phase(
    name: str, clients: Clients, server: Served, count: int, seconds: float, odd: Sequence[Awaitable[None]]
) -> tuple[Seen, list[float]]:
    """What clients saw, and the server's memory in MB, looked at now and then."""
    before = await asyncio.to_thread(server.counters)
    clients.seen, clients.over = Seen(), time.monotonic() + seconds
    start, memory = time.monotonic(), []
    running = asyncio.gather(*(clients.asking() for _ in range(count)), *odd)
    while not running.done():
        await asyncio.wait([running], timeout=max(seconds / 60, 2))
        used = server.memory()
        memory.append(sum(used.values()))
        minutes = (time.monotonic() - start) / 60
        parts = ", ".join(f"{part} {megabytes:.0f} MB" for part, megabytes in used.items())
        print(f"{name} {minutes:5.1f} min: {parts}; {dict(clients.seen.results)}", flush=True)
    await running
    after = await asyncio.to_thread(server.counters)
    took = {name: after[name] - before[name] for name in COUNTED}
    counts = ", ".join(f"{value:.0f} {name}" for name, value in took.items())
    print(f"{name}, the engine: {counts}; {1000 * took['step_seconds'] / took['steps']:.1f} ms a step", flush=True)
    return clients.seen, memory


def part(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))] if values else float("nan")


# --- set-up ---------------------------------------------------------------------------------------------------------


def tenants(model: Path, cold: int) -> tuple[dict[str, str], dict[str, list[str]], Callable[[], None]]:
    """Keys; names of routes, those of warm adapters first; and what changes a route."""
    from orchestrator.db import open_database
    from orchestrator.limits.quota import Quota
    from orchestrator.modeling.base_model import materialize
    from orchestrator.names import QualifiedName
    from orchestrator.registry.importing import import_adapter
    from orchestrator.registry.signing import Keys
    from orchestrator.registry.versions import Reference
    from orchestrator.routing.config import parse_config
    from orchestrator.routing.repository import save_route
    from orchestrator.store import Store
    from orchestrator.tenants.keys import create_key
    from orchestrator.tenants.tenant import add_tenant

    settings = load_settings()
    db, store = open_database(settings.database), Store(settings.store)
    digest = materialize(str(model), cache=settings.cache, store=store).digest
    keys, models = {}, {}
    each = WARM + cold // len(TENANTS)
    configs: dict[QualifiedName, dict[str, Any]] = {}
    for tenant_number, tenant in enumerate(TENANTS):
        add_tenant(db, tenant, Quota(), actor="soak")
        keys[tenant] = create_key(db, tenant, "soak", actor="soak").secret
        models[tenant] = [f"{tenant}/a{number}" for number in range(each)]
        for number in range(each):
            name = QualifiedName(tenant, f"a{number}")
            directory = new_adapter(model, 8, 100 * tenant_number + number, HOME / "new")
            version = import_adapter(
                db, store, directory, Reference(tenant=tenant, name=name.name), keys=Keys.of(settings), actor="soak",
                cache=settings.cache, max_rank=64, base=str(model), base_digest=digest,
            )  # fmt: skip
            configs[name] = {"adapters": [{"adapter": f"{name}@{version.digest}"}], "fallback": ["base"]}
            save_route(db, name, parse_config(name, configs[name]), actor="soak", expected=0)
    revisions = dict.fromkeys(configs, 1)

    def change() -> None:
        """One route, to another version of its default; who answers stays the same."""
        name = random.choice(list(configs))
        config = configs[name] | {"defaults": {"sampling": {"top_p": random.choice((0.9, 0.95))}}}
        saved = save_route(db, name, parse_config(name, config), actor="soak", expected=revisions[name])
        revisions[name] = saved.revision

    return keys, models, change


if __name__ == "__main__":
    main()
