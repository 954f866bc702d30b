"""The engine's step: plan, compute, choose, deliver. Not thread-safe: one thread owns it (see `serving.engine.local`)."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import (
    AdapterInUse,
    AdapterNotLoaded,
    AdaptoryError,
    EngineError,
    EngineOverloaded,
    InvalidRequest,
    NoFreeSlot,
    StepFailed,
)
from orchestrator.modeling.lora import Segment
from serving.engine.attention import KeyValueCache, Span, StepAttention
from serving.engine.grammar import Grammars, GrammarState, forbid
from serving.engine.network import ServedNetwork
from serving.engine.prepared import Adapter
from serving.engine.protocol import Backlog, EngineStats, FinishReason, GenerateRequest, TokenEvent, Usage
from serving.engine.sampler import Choice, choose
from serving.engine.scheduler import Limits, Scheduler, Sequence, Work
from serving.engine.text import TextStream

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Answer:
    """A request and what there is of its answer."""

    request: GenerateRequest
    sequence: Sequence
    seed: int
    text: TextStream
    grammar: GrammarState | None

    @property
    def length(self) -> int:
        return len(self.sequence.tokens) - self.sequence.prompt


@dataclass(frozen=True)
class Delivery:
    """News of one request: an event, the error that ended it, or neither when it was aborted."""

    request_id: str
    event: TokenEvent | None
    error: AdaptoryError | None = None

    @property
    def last(self) -> bool:
        return self.error is not None or (self.event is not None and self.event.finish is not None)


@dataclass(frozen=True)
class Batch:
    """A step's tokens, flat, sorted so that those of an adapter stand together."""

    work: list[Work]
    ids: Tensor
    attention: StepAttention
    segments: list[Segment]
    keep: Tensor | None
    """Tokens whose logits are wanted, one for each work that chooses; None: all."""


class EngineCore:
    """Answers requests step by step.

    Args:
        tokenizer: of transformers, for stop texts and text events.
        end: tokens that end an answer.
        clock: by which a request has waited for long.
    """

    def __init__(
        self,
        network: ServedNetwork,
        tokenizer: Any,
        end: frozenset[int],
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.network, self.tokenizer, self.end = network, tokenizer, end
        self.limits = limits = limits or Limits()
        a = network.architecture
        self.grammars = Grammars(tokenizer, a.vocab_size, end)
        self._cache = KeyValueCache(a, limits.blocks, limits.block_size, network.dtype, network.device)
        self._scheduler = Scheduler(limits, clock)
        self._answers: dict[Sequence, Answer] = {}
        self._by_id: dict[str, Answer] = {}
        self._prompt_tokens = self._shared_tokens = self._completion_tokens = 0
        self._steps = self._failed_steps = 0
        self._step_seconds = 0.0

    @torch.inference_mode()
    def step(self) -> list[Delivery]:
        """Compute the next tokens of what is running. An error of one request ends that one, an error of the step ends all."""
        start = time.perf_counter()
        try:
            work = self._scheduler.plan()
            if not work:
                return []
            self._cache.clear(self._scheduler.pool.newly_taken())
            batch = self._batch(work)
            hidden = self.network.hidden(batch.ids, batch.attention, batch.segments, batch.keep)
            for done in batch.work:
                self._scheduler.advance(done)
            chosen = [done.sequence for done in batch.work if len(done.sequence.tokens) == done.sequence.computed]
            tokens = self._choose(hidden, [self._answers[sequence] for sequence in chosen]) if chosen else []
        except Exception as error:
            log.exception("the engine's step failed")
            return self._fail_all(error)
        deliveries = [self._deliver(self._answers[s], token) for s, token in zip(chosen, tokens, strict=True)]
        seconds = time.perf_counter() - start
        if chosen:  # else a GPU may not be done
            self._scheduler.pace.took(len(batch.ids), seconds)
        self._steps += 1
        self._step_seconds += seconds
        return deliveries

    # requests

    def check(self, request: GenerateRequest) -> None:
        """
        Raises:
            InvalidRequest: it could never be answered here.
        """
        prompt, limits = request.prompt_ids, self.limits
        if not prompt:
            raise InvalidRequest("The prompt is empty.", field="prompt_ids")
        vocab = self.network.architecture.vocab_size
        if not all(0 <= token < vocab for token in prompt):
            raise InvalidRequest(f"The prompt has tokens outside the vocabulary of {vocab}.", field="prompt_ids")
        longest = min(limits.max_length, limits.blocks * limits.block_size)
        if len(prompt) >= longest:
            raise InvalidRequest(
                f"The prompt has {len(prompt)} tokens; prompt and answer together may have {longest}.",
                hint="Shorten the prompt.",
                field="prompt_ids",
                value=len(prompt),
            )

    def add(self, request: GenerateRequest, grammar: GrammarState | None = None) -> list[Delivery]:
        """
        Args:
            grammar: of the request's `response_format`, from `grammars`; None: compiled here if there is one.

        Returns:
            the end of a request that had to give way: too many wait, and its tenant has more of them than this one, or it is
            this tenant's own, and has waited for long or had no adapter to wait for.

        Raises:
            InvalidRequest: it could never be answered here, or its id is taken.
            AdapterNotLoaded: its adapter is in no slot.
            EngineOverloaded: too many wait.
        """
        self.check(request)
        if request.id in self._by_id:
            raise InvalidRequest(f"A request {request.id!r} is being answered.", field="id", value=request.id)
        if request.adapter is not None and request.adapter not in self.network.adapters:
            raise AdapterNotLoaded(f"The adapter {request.adapter} is not loaded.", adapter=request.adapter)
        queue, gives_way = self._scheduler.waiting, None
        waiting = len(queue)
        if self._scheduler.full and (gives_way := queue.gives_way(request.tenant, request.fetched)) is None:
            raise _overloaded(waiting)
        sampling = request.sampling
        if grammar is None and sampling.response_format is not None:
            grammar = self.grammars.matcher(sampling.response_format)
        answer = Answer(
            request,
            Sequence(list(request.prompt_ids), request.adapter, request.tenant, request.fetched),
            secrets.randbits(63) if sampling.seed is None else sampling.seed,
            TextStream(self.tokenizer, sampling.stop),
            grammar,
        )
        self._answers[answer.sequence] = self._by_id[request.id] = answer
        self._scheduler.add(answer.sequence)
        if gives_way is None:
            return []
        gone = self._answers[gives_way]
        self._remove(gone)
        return [Delivery(gone.request.id, None, _overloaded(waiting))]

    def abort(self, request_id: str) -> None:
        """Its blocks are free at once."""
        if answer := self._by_id.get(request_id):
            self._remove(answer)

    @property
    def busy(self) -> bool:
        return bool(self._answers)

    def fail(self, error: Callable[[str], AdaptoryError]) -> list[Delivery]:
        """End every request with an error."""
        ended = list(self._answers.values())
        for answer in ended:
            self._remove(answer, forget=True)
        return [Delivery(a.request.id, None, error(a.request.id)) for a in ended]

    # adapters

    def install(self, digest: str, adapter: Adapter) -> None:
        """
        Args:
            adapter: from `network.read`.

        Raises:
            NoFreeSlot: every slot is taken.
        """
        if digest in self.network.adapters:
            return
        if len(self.network.adapters) >= self.limits.max_adapters:
            raise NoFreeSlot(
                f"All {self.limits.max_adapters} adapter slots are taken.",
                hint="Unload an adapter first.",
                adapter=digest,
                slots=self.limits.max_adapters,
            )
        self.network.install(digest, adapter)

    def load(self, digest: str, directory: Path) -> None:
        """
        Raises:
            AdapterError: damaged, or it does not fit the base.
            NoFreeSlot: every slot is taken.
        """
        if digest not in self.network.adapters:
            self.install(digest, self.network.read(directory))

    def unload(self, digest: str) -> None:
        """
        Raises:
            AdapterInUse: requests still use it.
        """
        users = sum(a.request.adapter == digest for a in self._answers.values())
        if users:
            raise AdapterInUse(f"{users} requests use the adapter {digest}.", adapter=digest, requests=users)
        self.network.remove(digest)

    def swap(self, install: Mapping[str, Adapter], remove: Collection[str]) -> None:
        """Unload some adapters and install others, all of it or nothing.

        Args:
            install: those that are there already stay as they are.

        Raises:
            AdapterInUse: requests still use one of `remove`.
            NoFreeSlot: there would be too many.
        """
        if used := {a.request.adapter for a in self._answers.values()} & set(remove):
            raise AdapterInUse("Requests still use adapters that should leave.", adapters=sorted(map(str, used)))
        present = set(self.network.adapters)
        if len((present - set(remove)) | set(install)) > self.limits.max_adapters:
            raise NoFreeSlot(
                f"All {self.limits.max_adapters} adapter slots are taken.",
                hint="Unload more of them.",
                slots=self.limits.max_adapters,
            )
        for digest in remove:
            self.network.remove(digest)
        for digest, adapter in install.items():
            if digest not in self.network.adapters:
                self.network.install(digest, adapter)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            adapters=self.network.adapters,
            cache_tokens=self.limits.blocks * self.limits.block_size,
            cache_tokens_used=scheduler.pool.held * self.limits.block_size,
            prompt_tokens=self._prompt_tokens,
            shared_tokens=self._shared_tokens,
            completion_tokens=self._completion_tokens,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            failed_steps=self._failed_steps,
            step_seconds=self._step_seconds,
            waiting_tokens=scheduler.unread,
            cache_bytes=self._cache.memory.nbytes,
        )

    def backlog(self) -> Backlog:
        """Any thread may ask."""
        queue = self._scheduler.waiting
        return Backlog(self._scheduler.room, queue.new_of_each, queue.impatient)

    # parts of the step

    def _batch(self, work: list[Work]) -> Batch:
        """Single tokens first, and each kind by adapter: the linears take neighbours with few tokens together."""
        order = {digest: n for n, digest in enumerate((None, *self.network.adapters))}
        work = sorted(work, key=lambda w: (w.count > 1, order[w.sequence.adapter]))
        ids: list[int] = []
        segments: list[Segment] = []
        keep = []
        for (_, adapter), neighbours in itertools.groupby(work, key=lambda w: (w.count > 1, w.sequence.adapter)):
            start = len(ids)
            for w in neighbours:
                ids += w.sequence.tokens[w.sequence.computed : w.sequence.computed + w.count]
                if w.chooses:
                    keep.append(len(ids) - 1)
            segments.append(Segment(adapter, start, len(ids)))
        spans = [Span(w.sequence.blocks, w.sequence.computed + w.count, w.count) for w in work]
        device = self.network.device
        attention = self.network.attention(self._cache, spans)
        kept = None if len(keep) == len(ids) else torch.tensor(keep or [0], device=device)
        return Batch(work, torch.tensor(ids, device=device), attention, segments, kept)

    def _choose(self, hidden: Tensor, answers: list[Answer]) -> list[int | None]:
        logits = self.network.logits(hidden)
        bound = [(row, a.grammar) for row, a in enumerate(answers) if a.grammar is not None]
        if bound:
            forbid(logits, [row for row, _ in bound], [grammar for _, grammar in bound])
        return choose(logits, [Choice(a.request.sampling, a.seed, a.length) for a in answers])

    def _deliver(self, answer: Answer, token: int | None) -> Delivery:
        try:
            if token is None:
                raise EngineError(
                    "No next token could be chosen: the logits are not finite, or the response format allows none.",
                    hint="Evaluate the adapter, and check the schema.",
                    request=answer.request.id,
                    adapter=answer.request.adapter,
                )
            return Delivery(answer.request.id, self._advance(answer, token))
        except Exception as error:
            log.exception("request %s failed", answer.request.id)
            self._remove(answer, forget=True)
            return Delivery(answer.request.id, None, _typed(error, answer.request.id))

    def _advance(self, answer: Answer, token: int) -> TokenEvent:
        """Append a token to its answer, and end the answer if that ends it."""
        sampling, sequence = answer.request.sampling, answer.sequence
        if answer.grammar is not None:
            answer.grammar.accept(token)
        if token in self.end and not (sampling.ignore_end and answer.grammar is None):
            return self._finish(answer, (), answer.text.end(), FinishReason.STOP)
        sequence.tokens.append(token)
        text = answer.text.push(token)
        if answer.text.stopped:
            return self._finish(answer, (token,), text, FinishReason.STOP)
        if answer.length >= sampling.max_tokens or len(sequence.tokens) >= self._longest:
            return self._finish(answer, (token,), text + answer.text.end(), FinishReason.LENGTH)
        return TokenEvent((token,), text)

    @property
    def _longest(self) -> int:
        return min(self.limits.max_length, self.limits.blocks * self.limits.block_size)

    def _finish(self, answer: Answer, tokens: tuple[int, ...], text: str, reason: FinishReason) -> TokenEvent:
        sequence = answer.sequence
        usage = Usage(sequence.prompt, sequence.shared, answer.length)
        self._prompt_tokens += usage.prompt
        self._shared_tokens += usage.cached
        self._completion_tokens += usage.completion
        self._remove(answer)
        return TokenEvent(tokens, text, reason, usage)

    def _remove(self, answer: Answer, *, forget: bool = False) -> None:
        self._scheduler.remove(answer.sequence, forget=forget)
        del self._answers[answer.sequence], self._by_id[answer.request.id]

    def _fail_all(self, error: Exception) -> list[Delivery]:
        """What the step had computed when it failed is not known, so none of it is kept for sharing."""
        self._failed_steps += 1
        cause = f"{type(error).__name__}: {error}"
        return self.fail(
            lambda request: StepFailed(
                "The engine failed while it answered.", hint="Ask again.", request=request, cause=cause[:500]
            )
        )


def answers(core: EngineCore) -> Iterator[Delivery]:
    """Step until every request is answered."""
    while core.busy:
        yield from core.step()


def _overloaded(waiting: int) -> EngineOverloaded:
    return EngineOverloaded(f"{waiting} requests wait already.", hint="Ask again later.", waiting=waiting)


def _typed(error: Exception, request: str) -> AdaptoryError:
    if isinstance(error, AdaptoryError):
        return error
    return EngineError(f"The request failed: {type(error).__name__}: {error}", request=request)
