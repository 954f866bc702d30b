"""vLLM as an engine: `AsyncLLM` behind the `Engine` protocol. The only module that imports vllm.

It runs in an environment of its own, since vLLM wants another transformers than we do (see `serving.engine.choice`).
Adapters come as `Prepared`, so admitted already, and go to vLLM as files that this module writes: every scale is in B, so what
vLLM reads of a configuration (and what it leaves unread) cannot change an adapter, and nobody else writes those files.
vLLM applies an adapter's modules that it finds and says nothing of the others (vllm#34186, #48019, #55193), therefore
after each load its workers are asked what they did not take (`serving.engine.vllm_worker`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from orchestrator.errors import (
    AdapterError,
    AdapterInUse,
    AdapterNotLoaded,
    AdaptoryError,
    EngineError,
    EngineOverloaded,
    EngineStopped,
    InvalidRequest,
    NoFreeSlot,
    StepFailed,
)
from orchestrator.modeling.adapter_files import AdapterConfig, read_adapter, write_adapter
from orchestrator.modeling.prompts import end_tokens
from serving.engine.prepared import Piece, Places, Prepared, prepare
from serving.engine.protocol import (
    Backlog,
    EngineStats,
    FinishReason,
    GenerateRequest,
    JsonSchema,
    Sampling,
    TokenEvent,
    Usage,
)
from serving.engine.text import TextStream

# Read when vllm is imported. Bound threads would share their cores with a job that is bound to the same.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import AsyncEngineArgs, SamplingParams
from vllm.exceptions import LoRAAdapterNotFoundError, VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput

log = logging.getLogger(__name__)

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank (`vllm.config.lora.MaxLoRARanks`)."""

_WATCH_SECONDS = 0.5

_BASE = "base"
"""As vLLM's adapters are called, that of requests without one; all others are digests."""

_TRANSFERRED = 64
"""Bits of the largest whole number that vLLM sends to its engine's process."""


@dataclass(frozen=True)
class VllmLimits:
    """Sizes of an engine of vLLM."""

    max_sequences: int = 64
    """Answered at the same time."""
    max_length: int = 8192
    """Tokens of prompt and answer together."""
    max_waiting: int = 1024
    max_adapters: int = 64
    """Loaded at the same time."""
    batch_adapters: int = 8
    """Different ones in one step; requests for more wait. Each reserves room for `max_rank` on the device."""
    max_rank: int = 64
    cache_bytes: int | None = None
    """Of the key-value cache; None: what vLLM finds on a GPU, `cache_share` of the free memory on a CPU."""
    cache_share: float = 0.25
    eager: bool = False
    """Start without compiling: sooner there, slower afterwards."""


@dataclass(eq=False)
class _Running:
    adapter: str | None
    unread: int
    """Tokens of its prompt, until it has begun."""
    aborted: bool = False


class VllmEngine:
    """To be made and used in one event loop.

    Args:
        model: the base model's directory.
        places: linears of the base that an adapter may target.
        died: called when vLLM has ended though nobody closed it.

    Raises:
        Exception: whatever vLLM says when it cannot start.
    """

    def __init__(
        self,
        model: Path,
        places: Places,
        dtype: torch.dtype,
        limits: VllmLimits | None = None,
        died: Callable[[], None] | None = None,
    ):
        self.limits, self.dtype, self._died = limits or VllmLimits(), dtype, died
        self._places = places
        self._directory = Path(tempfile.mkdtemp(prefix="adaptory-vllm-"))
        self._adapters: dict[str, LoRARequest] = {}
        self._numbers: dict[str, int] = {_BASE: 1}
        self._base = self._base_alone() if current_platform.is_cpu() else None
        self._running: dict[str, _Running] = {}
        self._swapping = asyncio.Lock()
        self._closed = False
        self._record = _Record()
        self._cached_tokens = self._prompt_tokens = self._completion_tokens = 0
        try:
            self._llm = AsyncLLM.from_engine_args(self._arguments(model), stat_loggers=[self._record.logger])
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        self._vocab = self._llm.model_config.get_vocab_size()
        self._tokenizer = self._llm.get_tokenizer()
        self._end = end_tokens(self._tokenizer)
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Its processes go when this one does, however that dies; and this one hears when they are gone."""
        with contextlib.suppress(EngineDeadError):
            await self._llm.collective_rpc("adaptory_follow", args=(os.getpid(),))
        while self.alive:
            await asyncio.sleep(_WATCH_SECONDS)
        if not self._closed and self._died is not None:
            self._died()

    def _arguments(self, model: Path) -> AsyncEngineArgs:
        limits = self.limits
        cache = limits.cache_bytes
        if cache is None and current_platform.is_cpu():
            cache = int(limits.cache_share * psutil.virtual_memory().available)
        return AsyncEngineArgs(
            model=str(model),
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=limits.max_length,
            max_num_seqs=limits.max_sequences,
            kv_cache_memory_bytes=cache,
            # its keys of shared prefixes hold an adapter's name, which is the digest here, and path (vllm#30931)
            enable_prefix_caching=True,
            enable_lora=True,
            max_loras=min(limits.batch_adapters, limits.max_adapters) + (self._base is not None),
            # what arrives is there before what leaves has left, and vLLM must never drop one by itself
            max_cpu_loras=2 * limits.max_adapters + 1,
            max_lora_rank=next((rank for rank in _RANKS if rank >= limits.max_rank), _RANKS[-1]),
            worker_extension_cls="serving.engine.vllm_worker.Extension",
            enforce_eager=limits.eager,
            structured_outputs_config={"backend": "xgrammar"},
            generation_config="vllm",  # a request says how it is sampled, not a file of the model
            trust_remote_code=False,
            seed=secrets.randbits(31),
            disable_log_stats=True,
            enable_log_requests=False,
        )

    # requests

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        self._check(request)
        lora = self._base if request.adapter is None else self._adapters[request.adapter]
        running = self._running[request.id] = _Running(request.adapter, len(request.prompt_ids))
        self._record.begin(len(self._running))
        answer = _Answer(request, self._end, TextStream(self._tokenizer, request.sampling.stop))
        prompt = tokens_input(list(request.prompt_ids))
        try:
            params = _params(request.sampling, self._end)
            outputs = self._llm.generate(prompt, params, request.id, lora_request=lora)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if running.aborted or output.outputs[0].finish_reason == "abort":
                        break
                    running.unread = 0
                    event = answer.event(output)
                    if event.usage is not None:
                        self._count(event.usage)
                    yield event
                    if event.finish is not None:
                        return
            if self._closed:
                raise _stopped(request=request.id)
        except (VLLMClientError, EngineGenerateError, EngineDeadError, ValueError) as error:
            raise self._typed(error, request, begun=answer.length > 0) from error
        finally:
            del self._running[request.id]
            self._record.end(len(self._running))

    async def abort(self, request_id: str) -> None:
        if running := self._running.get(request_id):
            running.aborted = True
            await self._llm.abort(request_id)

    def _check(self, request: GenerateRequest) -> None:
        if self._closed or not self.alive:
            raise _stopped(request=request.id)
        prompt, longest = request.prompt_ids, self.limits.max_length
        if not prompt:
            raise InvalidRequest("The prompt is empty.", field="prompt_ids")
        if not all(0 <= token < self._vocab for token in prompt):
            raise InvalidRequest(f"The prompt has tokens outside the vocabulary of {self._vocab}.", field="prompt_ids")
        if len(prompt) >= longest:
            raise InvalidRequest(
                f"The prompt has {len(prompt)} tokens; prompt and answer together may have {longest}.",
                hint="Shorten the prompt.",
                field="prompt_ids",
                value=len(prompt),
            )
        if request.id in self._running:
            raise InvalidRequest(f"A request {request.id!r} is being answered.", field="id", value=request.id)
        if request.adapter is not None and request.adapter not in self._adapters:
            raise AdapterNotLoaded(f"The adapter {request.adapter} is not loaded.", adapter=request.adapter)
        waiting = len(self._running) - self.limits.max_sequences
        if waiting >= self.limits.max_waiting:
            raise EngineOverloaded(f"{waiting} requests wait already.", hint="Ask again later.", waiting=waiting)

    def _count(self, usage: Usage) -> None:
        self._prompt_tokens += usage.prompt
        self._cached_tokens += usage.cached
        self._completion_tokens += usage.completion

    def _typed(self, error: Exception, request: GenerateRequest, *, begun: bool) -> AdaptoryError:
        cause = error.__cause__ if isinstance(error, EngineGenerateError) and error.__cause__ else error
        told = (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]
        if isinstance(cause, LoRAAdapterNotFoundError):
            return AdapterNotLoaded(f"The adapter {request.adapter} is not loaded.", adapter=request.adapter)
        if self._closed:
            return _stopped(request=request.id)
        if not begun and isinstance(cause, ValueError | VLLMClientError):
            field = "response_format.schema" if request.sampling.response_format is not None else None
            return InvalidRequest(f"vLLM does not take the request: {told}", field=field)
        return StepFailed("The engine failed while it answered.", hint="Ask again.", request=request.id, cause=told)

    # adapters

    async def load_adapter(self, digest: str, directory: Path) -> None:
        if digest not in self._adapters:
            prepared = await asyncio.to_thread(self._read, directory)
            await self.swap_adapters({digest: prepared}, [])

    async def unload_adapter(self, digest: str) -> None:
        await self.swap_adapters({}, [digest])

    async def swap_adapters(self, install: Mapping[str, Prepared], remove: Collection[str]) -> None:
        async with self._swapping:
            new = {digest: prepared for digest, prepared in install.items() if digest not in self._adapters}
            self._check_swap(new, remove)
            leaving = {digest: self._adapters.pop(digest) for digest in remove if digest in self._adapters}
            added: dict[str, LoRARequest] = {}
            try:
                for digest, prepared in new.items():
                    added[digest] = await self._add(digest, prepared)
            except BaseException:
                self._adapters |= leaving
                for lora in added.values():
                    await self._remove(lora)
                raise
            self._adapters |= added
            for lora in leaving.values():
                await self._remove(lora)

    def _check_swap(self, new: Mapping[str, Prepared], remove: Collection[str]) -> None:
        if self._closed or not self.alive:
            raise _stopped()
        users = [running.adapter for running in self._running.values() if running.adapter in remove]
        if users:
            raise AdapterInUse(f"{len(users)} requests use {users[0]}.", adapter=users[0], requests=len(users))
        slots = self.limits.max_adapters
        if new and len(set(self._adapters) - set(remove)) + len(new) > slots:
            raise NoFreeSlot(f"All {slots} adapter slots are taken.", hint="Unload more of them.", slots=slots)
        for digest, prepared in new.items():
            rank = max(piece.rank for piece in prepared.pieces)
            if rank > self.limits.max_rank:
                raise AdapterError(
                    f"The adapter {digest} has rank {rank}; this engine serves up to {self.limits.max_rank}.",
                    hint="Train it with a lower tuning.rank, or raise the engine's limit.",
                    adapter=digest,
                    check="rank",
                )

    def _base_alone(self) -> LoRARequest:
        """An adapter of zeros for requests without one. On a CPU vLLM gives a request that has none the adapter in the last
        slot, if another in the batch has one (vllm#48421, #49656): somebody else's, silently."""
        name, place = next(iter(self._places.items()))
        nothing = torch.zeros(place.in_features + place.out_features, dtype=self.dtype)
        directory = self._directory / str(self._numbers[_BASE])
        _write(directory, Prepared((Piece(place, 1),), nothing), {name: place})
        return LoRARequest(_BASE, self._numbers[_BASE], str(directory))  # vLLM loads it with the first request

    def _read(self, directory: Path) -> Prepared:
        config, tensors = read_adapter(directory)
        return prepare(config, tensors, self._places, self.dtype, str(directory))

    async def _add(self, digest: str, prepared: Prepared) -> LoRARequest:
        number = self._numbers.setdefault(digest, len(self._numbers) + 1)
        directory = self._directory / str(number)
        lora = LoRARequest(digest, number, str(directory))
        await asyncio.to_thread(_write, directory, prepared, self._places)
        try:
            await self._llm.add_lora(lora)
            unused = await self._llm.collective_rpc("adaptory_unused_modules", args=(number,))
            if names := sorted({name for worker in unused for name in worker}):
                raise ValueError(f"it leaves out {', '.join(names[:3])} and {len(names) - 1} others")
        except EngineDeadError as error:
            raise _stopped() from error
        except Exception as error:
            with contextlib.suppress(Exception):
                await self._remove(lora)
            told = (str(error).strip() or type(error).__name__).splitlines()[-1][:300]
            raise AdapterError(
                f"The adapter {digest} cannot be served by vLLM: {told}",
                hint="Serve it with the engine of Adaptory's own.",
                adapter=digest,
                check="names",
            ) from error
        return lora

    async def _remove(self, lora: LoRARequest) -> None:
        """Its files are kept until now, as vLLM reads them again if it ever has to."""
        await self._llm.remove_lora(lora.lora_int_id)
        await asyncio.to_thread(shutil.rmtree, lora.lora_path, ignore_errors=True)

    # its state

    def stats(self) -> EngineStats:
        config = self._llm.vllm_config.cache_config
        capacity = (config.num_gpu_blocks or 0) * config.block_size
        requests, record = len(self._running), self._record
        waiting = min(requests, record.waiting)
        return EngineStats(
            running=requests - waiting,
            waiting=waiting,
            adapters=tuple(self._adapters),
            cache_tokens=capacity,
            cache_tokens_used=round(record.cache_usage * capacity) if requests else 0,
            prompt_tokens=self._prompt_tokens,
            shared_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            preemptions=record.preemptions,
            steps=record.steps,
            failed_steps=0 if self._closed or self.alive else 1,
            step_seconds=record.busy_seconds,
            waiting_tokens=sum(running.unread for running in self._running.values()),
            cache_bytes=config.kv_cache_memory_bytes or 0,
        )

    def backlog(self) -> Backlog:
        return Backlog(self.limits.max_sequences + self.limits.max_waiting - len(self._running), {})

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return not self._closed and not self._llm.errored

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._watching.cancel()
        with contextlib.suppress(EngineDeadError):
            for request_id in list(self._running):
                await self._llm.abort(request_id)
        await asyncio.to_thread(self._llm.shutdown)
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)


class _Answer:
    """One answer as it grows.

    Its text is made here and not by vLLM, which begins an answer with the last bytes of the prompt where they are no whole
    character; and so it ends where our own engine's does.
    """

    def __init__(self, request: GenerateRequest, end: frozenset[int], text: TextStream):
        self._request, self._end, self._text = request, end, text
        self.length = 0
        """Tokens, the end of turn excluded."""

    def event(self, output: RequestOutput) -> TokenEvent:
        """
        Raises:
            EngineError: it ended for no reason of its own.
        """
        found = output.outputs[0]
        tokens, finish = tuple(found.token_ids), _finish(found, self._request)
        if finish is FinishReason.STOP and tokens and tokens[-1] in self._end:
            tokens = tokens[:-1]
        text = ""
        for number, token in enumerate(tokens, start=1):
            text += self._text.push(token)
            if self._text.stopped:
                tokens, finish = tokens[:number], FinishReason.STOP
                break
        self.length += len(tokens)
        if finish is None:
            return TokenEvent(tokens, text)
        usage = Usage(len(self._request.prompt_ids), output.num_cached_tokens or 0, self.length)
        return TokenEvent(tokens, text + self._text.end(), finish, usage)


def _finish(found: CompletionOutput, request: GenerateRequest) -> FinishReason | None:
    match found.finish_reason:
        case None:
            return None
        case "stop":
            return FinishReason.STOP
        case "length":
            return FinishReason.LENGTH
        case other:
            raise EngineError(
                f"The request failed in the engine: {other}.", request=request.id, adapter=request.adapter
            )


def _params(sampling: Sampling, end: frozenset[int]) -> SamplingParams:
    match sampling.response_format:
        case None:
            structure = None
        case JsonSchema(schema=schema):
            structure = StructuredOutputsParams(json=schema)
        case _:
            structure = StructuredOutputsParams(json_object=True)
    ends = structure is not None or not sampling.ignore_end
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=None if sampling.seed is None else sampling.seed % 2 ** (_TRANSFERRED - 1),
        ignore_eos=not ends,
        stop_token_ids=sorted(end) if ends else [],
        structured_outputs=structure,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _write(directory: Path, prepared: Prepared, places: Places) -> None:
    """A plain adapter in PEFT's format, alpha being the rank: its scale is in B already."""
    names = {(place.linear, place.projection): name for name, place in places.items()}
    tensors: dict[str, torch.Tensor] = {}
    for linear, updates in prepared.updates(torch.device("cpu")).items():
        for update in updates:
            name = names[linear, update.projection]
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = update.a, update.b
    rank = max(piece.rank for piece in prepared.pieces)
    ranks = {names[piece.place.linear, piece.place.projection]: piece.rank for piece in prepared.pieces}
    config = AdapterConfig(rank, rank, tuple({name.rpartition(".")[2] for name in ranks}))
    others = {name: other for name, other in ranks.items() if other != rank}
    write_adapter(directory, replace(config, rank_pattern=others, alpha_pattern=dict(others)), tensors)


class _Record:
    """What vLLM tells of its steps, and when there was work."""

    def __init__(self) -> None:
        self.waiting = self.steps = self.preemptions = 0
        self.cache_usage = 0.0
        self._busy = 0.0
        self._since: float | None = None

    def begin(self, requests: int) -> None:
        if requests == 1:
            self._since = time.perf_counter()

    def end(self, requests: int) -> None:
        if requests == 0 and self._since is not None:
            self._busy, self._since = self.busy_seconds, None

    @property
    def busy_seconds(self) -> float:
        """vLLM does not say how long a step takes; while there are requests one follows upon the other."""
        return self._busy + (0.0 if self._since is None else time.perf_counter() - self._since)

    def logger(self, config: Any, engine_index: int = 0) -> StatLoggerBase:
        return _Logger(self)


class _Logger(StatLoggerBase):
    def __init__(self, record: _Record):
        self._record = record

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        record = self._record
        record.steps += 1
        if scheduler_stats is not None:
            record.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            record.cache_usage = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            record.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        pass


def _stopped(**context: Any) -> EngineStopped:
    return EngineStopped("The engine is shut down.", hint="Ask another replica.", **context)
