"""The gateway with a real database, routes, keys and tokenizer; only the engine is a fake that says what it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from orchestrator.db import Database, open_database
from orchestrator.errors import AdaptoryError, RouteNotFound
from orchestrator.limits.limiter import LocalLimiter
from orchestrator.limits.quota import Quota
from orchestrator.modeling.prompts import load_tokenizer
from orchestrator.names import AdapterReference, QualifiedName
from orchestrator.routing.adapters import ResolvedAdapter
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import get_route, save_route
from orchestrator.routing.table import build_table
from orchestrator.tenants.keys import authenticate, create_key
from orchestrator.tenants.tenant import add_tenant, set_quota
from orchestrator.tenants.usage import UsageWriter, report
from serving.engine.protocol import FinishReason, GenerateRequest, TokenEvent, Usage
from serving.gateway.app import create_app
from serving.gateway.gateway import Bounds, Gateway, ServedBase
from serving.gateway.ports import Running
from serving.gateway.prompts import Prompts

BASE = "sha256:" + "b" * 64
INTENTS, OLDER, FOREIGN = ("sha256:" + letter * 64 for letter in "123")
LONGEST = 400


@dataclass
class FakeEngine:
    """Answers `words`, one a token, and remembers what it was asked and what was broken off."""

    words: tuple[str, ...] = ("Hel", "lo", " wörld")
    failures: dict[str | None, AdaptoryError] = field(default_factory=dict)
    """By adapter: why it cannot answer."""
    broken: AdaptoryError | None = None
    """Ends each answer after its first token."""
    slowly: float = 0.0
    """Seconds between two tokens."""
    asked: list[GenerateRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    async def begin(self, request: GenerateRequest, *, stream: bool) -> Running:
        self.asked.append(request)
        if (failure := self.failures.get(request.adapter)) is not None:
            raise failure

        async def close() -> None:
            self.closed.append(request.id)

        return Running("replica-1", self._events(request, stream), close)

    async def _events(self, request: GenerateRequest, stream: bool) -> AsyncIterator[TokenEvent]:
        usage = Usage(len(request.prompt_ids), 1, len(self.words))
        if not stream:
            await asyncio.sleep(self.slowly)
            if self.broken is not None:
                raise self.broken
            yield TokenEvent(tuple(range(len(self.words))), "".join(self.words), FinishReason.STOP, usage)
            return
        for number, word in enumerate(self.words):
            last = number == len(self.words) - 1
            yield TokenEvent((number,), word, FinishReason.STOP if last else None, usage if last else None)
            await asyncio.sleep(self.slowly)
            if self.broken is not None:
                raise self.broken
        self.finished.append(request.id)


@dataclass
class World:
    """A gateway and all around it. `acme` and `globex` are tenants with a key each."""

    db: Database
    engine: FakeEngine
    gateway: Gateway
    keys: dict[str, str]
    tokenizer: Any
    limiter: LocalLimiter
    usage: UsageWriter
    refresh: Callable[[], None]
    base: str = BASE
    intents: str = INTENTS
    older: str = OLDER

    @property
    def app(self) -> Any:
        return create_app(self.gateway)

    def client(self, tenant: str | None = "acme", **options: Any) -> httpx2.AsyncClient:
        headers = {"authorization": f"Bearer {self.keys[tenant]}"} if tenant else {}
        transport = httpx2.ASGITransport(app=self.app)
        return httpx2.AsyncClient(transport=transport, base_url="http://gateway", headers=headers, **options)

    def ask(self, path: str, body: Any = None, *, tenant: str | None = "acme", method: str = "POST") -> httpx2.Response:
        """One request, from outside any event loop."""

        async def send() -> httpx2.Response:
            async with self.client(tenant) as client:
                content = None if body is None else json.dumps(body)  # escapes what httpx2 could not encode
                return await client.request(method, path, content=content)

        return asyncio.run(send())

    def chat(self, text: str = "What is it?", *, tenant: str = "acme", **fields: Any) -> httpx2.Response:
        body = {"model": "acme/intents", "messages": [{"role": "user", "content": text}]} | fields
        return self.ask("/v1/chat/completions", body, tenant=tenant)

    def route(self, name: str, **config: Any) -> None:
        qualified = QualifiedName.parse(name)
        try:
            revision = get_route(self.db, qualified).revision
        except RouteNotFound:
            revision = 0
        save_route(self.db, qualified, parse_config(qualified, config), actor="test", expected=revision)
        self.refresh()

    def limit(self, **changes: int | None) -> None:
        set_quota(self.db, "acme", changes, actor="test")

    def used(self) -> list[dict[str, Any]]:
        self.usage.flush()
        return report(self.db)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    return load_tokenizer(tiny_model("llama"))


@pytest.fixture
def world(home: Path, tokenizer: Any) -> Iterator[World]:
    db = open_database(f"sqlite:///{home / 'state.db'}")
    keys = {}
    for tenant in ("acme", "globex"):
        add_tenant(db, tenant, Quota(), actor="test")
        keys[tenant] = create_key(db, tenant, "first", actor="test").secret
    adapters = {
        AdapterReference("acme", "intents", "production"): INTENTS,
        AdapterReference("acme", "intents", "1"): OLDER,
        AdapterReference("globex", "router", "1"): FOREIGN,
    }

    def resolver(references: Any) -> dict[AdapterReference, ResolvedAdapter]:
        return {r: ResolvedAdapter(adapters[r], BASE) for r in references if r in adapters}

    tables = [build_table(db, resolver, {"tiny": BASE})]
    engine, limiter, usage = FakeEngine(), LocalLimiter(), UsageWriter(db)
    gateway = Gateway(
        authenticate=lambda key: authenticate(db, key),
        routes=lambda: tables[-1],
        bases={BASE: ServedBase("tiny", BASE, Prompts(tokenizer, LONGEST), engine)},
        limiter=limiter,
        usage=usage,
        metrics_key="the-operators-own",
        bounds=Bounds(body_bytes=20_000, body_seconds=0.3),
    )
    made = World(
        db,
        engine,
        gateway,
        keys,
        tokenizer,
        limiter,
        usage,
        lambda: tables.append(build_table(db, resolver, {"tiny": BASE})),
    )
    made.route("acme/intents", adapters=[{"adapter": "acme/intents@production"}])
    made.route("globex/router", adapters=[{"adapter": "globex/router@1"}])
    yield made
    db.close()
