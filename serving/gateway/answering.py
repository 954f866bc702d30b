"""A request's way: whose it is, which adapter answers, what it may cost, the answer, and what it did cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from orchestrator import errors
from orchestrator.errors import AdaptoryError, ModelUnavailable
from orchestrator.limits.buckets import Refused
from orchestrator.limits.limiter import Reservation
from orchestrator.routing.table import Choice, Target
from orchestrator.tenants.keys import Principal
from orchestrator.tenants.tenant import Tenant
from serving.engine.protocol import GenerateRequest, TokenEvent
from serving.gateway.errors import body_of, limited, said, status_of
from serving.gateway.gateway import Gateway
from serving.gateway.ports import Running
from serving.gateway.requests import ChatRequest, CompletionRequest

log = logging.getLogger("serving.requests")

T = TypeVar("T")

CLIENT_GONE = 499
"""What the metrics call the status of a request whose client went away; nobody is sent it."""

_NEXT_MAY_ANSWER = (errors.AdapterError, errors.AdapterUnavailable, errors.AdapterNotLoaded, errors.StoreError)
"""What keeps one adapter from answering, and not the next of the chain. An engine that is full is as full for all of them."""


@dataclass
class Account:
    """What is known of one request, for headers, usage, metrics and the log: never a word of it."""

    request_id: str
    principal: Principal
    started: float = field(default_factory=time.monotonic)
    model: str | None = None
    """The public name, once it has led somewhere."""
    answering: Choice | None = None
    replica: str | None = None
    first_token: float | None = None
    """Seconds from the start."""
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0

    @property
    def adapter(self) -> str | None:
        return self.answering.adapter if self.answering else None


class Answering:
    """The service behind both endpoints."""

    def __init__(self, gateway: Gateway):
        self._gateway = gateway

    @contextlib.asynccontextmanager
    async def answer(
        self, body: ChatRequest | CompletionRequest, account: Account
    ) -> AsyncIterator[AsyncGenerator[TokenEvent, None]]:
        """Events of the answer, from a replica that has taken the request. Leaving the block early aborts it.

        Raises:
            AdaptoryError: nothing was answered, and nothing is charged.
        """
        with self._measured(account):
            target = await self._resolved(account.principal.tenant.name, body)
            account.model = target.model
            self._gateway.full.check(account.principal.tenant.name, target.choices[0])
            requests = [(choice, await self._request(body, target, choice, account)) for choice in target.choices]
            most = max(len(request.prompt_ids) + request.sampling.max_tokens for _, request in requests)
            async with self._reserved(account, most):
                running = await self._first_that_can(requests, account, stream=bool(body.stream))
                events = self._counted(running, account)
                try:
                    yield events
                finally:
                    await events.aclose()
                    await running.close()

    # parts

    async def _resolved(self, tenant: str, body: ChatRequest | CompletionRequest) -> Target:
        resolve = self._gateway.routes().resolve
        if "@" in body.model:  # a version that was not asked for before is looked up in the database
            return await asyncio.to_thread(resolve, tenant, body.model)
        return resolve(tenant, body.model, body.person)

    async def _request(
        self, body: ChatRequest | CompletionRequest, target: Target, choice: Choice, account: Account
    ) -> GenerateRequest:
        prompts, defaults = self._gateway.bases[choice.base_digest].prompts, target.defaults
        sampling = body.sampling(defaults)
        if isinstance(body, ChatRequest):
            messages = [message.plain() for message in body.messages]
            if defaults.system is not None and all(message["role"] != "system" for message in messages):
                messages.insert(0, {"role": "system", "content": defaults.system})
            ids = await _tokenised(prompts.chat, messages, sum(len(message["content"]) for message in messages))
        else:
            prompt = body.one_prompt()
            if isinstance(prompt, str):
                ids = await _tokenised(prompts.text, prompt, len(prompt))
            else:
                ids = prompts.ids(prompt)
        room = prompts.longest - len(ids)
        if sampling.max_tokens > room:
            sampling = replace(sampling, max_tokens=room)
        # an id of its own: a request's may be the client's choice
        return GenerateRequest(ids, choice.adapter, sampling, tenant=account.principal.tenant.name)

    @contextlib.asynccontextmanager
    async def _reserved(self, account: Account, most: int) -> AsyncIterator[None]:
        """A place among the tenant's requests; afterwards what was used, exactly, is settled and recorded."""
        tenant, limiter = account.principal.tenant, self._gateway.limiter
        taken = await self._reserve(tenant, most)
        try:
            yield
        finally:
            if account.answering is None:
                end = self._limited(limiter.cancel, taken)
            else:
                end = self._limited(limiter.settle, taken, account.tokens_in + account.tokens_out)
                self._gateway.usage.add(
                    tenant.name,
                    account.model or "",
                    account.adapter,
                    tokens_in=account.tokens_in,
                    tokens_out=account.tokens_out,
                )
            await asyncio.shield(end)  # what brought us here may be a cancellation

    async def _reserve(self, tenant: Tenant, most: int) -> Reservation:
        """A client that goes away meanwhile must not leave a place taken that nobody gives back."""
        limiter = self._gateway.limiter
        asked = asyncio.ensure_future(self._limited(limiter.reserve, tenant.name, tenant.quota, most))
        try:
            taken = await asyncio.shield(asked)
        except asyncio.CancelledError:
            if isinstance(late := await asked, Reservation):
                await self._limited(limiter.cancel, late)
            raise
        if isinstance(taken, Refused):
            raise limited(taken)
        return taken

    async def _limited(self, call: Callable[..., T], *arguments: Any) -> T:
        """A call of the limiter, on a thread if it may take long."""
        return await asyncio.to_thread(call, *arguments) if self._gateway.limiter.waits else call(*arguments)

    async def _first_that_can(
        self, requests: Sequence[tuple[Choice, GenerateRequest]], account: Account, *, stream: bool
    ) -> Running:
        """The first of the chain whose adapter can be had; why the others cannot is logged, so no fallback is silent."""
        failures: list[AdaptoryError] = []
        for choice, request in requests:
            try:
                running = await self._gateway.bases[choice.base_digest].engine.begin(request, stream=stream)
            except _NEXT_MAY_ANSWER as error:
                failures.append(error)
                facts = {
                    "request": account.request_id,
                    "model": account.model,
                    "adapter": choice.adapter,
                    "error": error.code,
                }
                log.warning(json.dumps(facts | {"unavailable": error.message}))
                continue
            except errors.EngineOverloaded as error:
                self._gateway.full.tell(request.tenant, choice, error)
                raise
            account.answering, account.replica = choice, running.replica
            account.tokens_in = len(request.prompt_ids)
            return running
        if len(failures) == 1:
            raise failures[0]
        raise ModelUnavailable(
            f"Nothing of {account.model} can answer now: {' '.join(map(said, failures))}",
            hint="Ask again.",
            model=account.model,
            reasons=[error.code for error in failures],
        )

    async def _counted(self, running: Running, account: Account) -> AsyncGenerator[TokenEvent, None]:
        """The events as they come."""
        metrics = self._gateway.metrics
        first = metrics.first_token.labels(*metrics.labels(account.model, account.adapter))
        between = metrics.between_tokens.labels(*metrics.labels(account.model, account.adapter))
        last = account.started
        async for event in running.events:
            now = time.monotonic()
            if account.first_token is None:
                account.first_token = now - account.started
                first.observe(account.first_token)
            else:
                between.observe(now - last)
            last = now
            account.tokens_out += len(event.tokens)
            if event.usage is not None:
                account.tokens_cached, account.tokens_out = event.usage.cached, event.usage.completion
            yield event

    @contextlib.contextmanager
    def _measured(self, account: Account) -> Iterator[None]:
        """Metrics and one line of log for the request, however it ends."""
        metrics = self._gateway.metrics
        status, code = 200, None
        metrics.in_flight.inc()
        try:
            if not self._gateway.ready():  # after it was counted: who drains sees either none of it or all of it
                raise errors.GatewayDraining(
                    "This gateway ends when it has answered what it had begun.", hint="Ask again in some seconds."
                )
            yield
        except Exception as error:
            status, code = status_of(error), body_of(error)["error"]["code"]
            raise
        except BaseException:
            status = CLIENT_GONE
            raise
        finally:
            seconds = time.monotonic() - account.started
            labels = metrics.labels(account.model, account.adapter)
            metrics.in_flight.dec()
            metrics.requests.labels(*labels, str(status)).inc()
            if code is not None:
                metrics.errors.labels(*labels, code).inc()
            if account.answering is not None:
                self._gateway.full.ended(account.answering.base_digest, seconds)
                metrics.duration.labels(*labels).observe(seconds)
                metrics.tokens_in.labels(*labels).inc(account.tokens_in)
                metrics.tokens_cached.labels(*labels).inc(account.tokens_cached)
                metrics.tokens_out.labels(*labels).inc(account.tokens_out)
                metrics.fallbacks.labels(*labels).inc(account.answering.fallback)
            log.info(_line(account, status, code, seconds))


async def _tokenised(call: Callable[[T], tuple[int, ...]], words: T, characters: int) -> tuple[int, ...]:
    """On a thread if it could hold up others: a thousand characters take 0.4 ms, and the way to a thread and back as long."""
    return call(words) if characters <= _SHORT else await asyncio.to_thread(call, words)


_SHORT = 1000


def _line(account: Account, status: int, code: str | None, seconds: float) -> str:
    facts = {
        "request": account.request_id,
        "tenant": account.principal.tenant.name,
        "key": account.principal.key_id,
        "model": account.model,
        "base": account.answering.base_digest if account.answering else None,
        "adapter": account.adapter,
        "replica": account.replica,
        "fallback": account.answering.fallback if account.answering else None,
        "status": status,
        "error": code,
        "first_token_seconds": None if account.first_token is None else round(account.first_token, 4),
        "seconds": round(seconds, 4),
        "tokens_in": account.tokens_in,
        "tokens_cached": account.tokens_cached,
        "tokens_out": account.tokens_out,
    }
    return json.dumps({name: value for name, value in facts.items() if value is not None})
