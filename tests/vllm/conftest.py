"""A tiny base, adapters for it, and one engine of vLLM for all tests: it takes half a minute to start.

`make test-vllm` runs `test_engine.py` in vLLM's environment and `test_serving.py` in ours.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch

from orchestrator.modeling.adapter_check import base_modules
from orchestrator.modeling.adapter_files import AdapterConfig, write_adapter
from serving.engine.protocol import FinishReason, GenerateRequest, Sampling, TokenEvent, Usage

if TYPE_CHECKING:
    from serving.engine.vllm import VllmEngine

T = TypeVar("T")

VLLM_PYTHON = os.environ.get("ADAPTORY_VLLM_PYTHON")
"""Read before the fixture `home` takes all such variables away."""

PHANTOM = "model.layers.7.self_attn.q_proj"
"""A linear that the engine is told of and the model, of two layers, does not have."""

SHAPES: dict[str, dict[str, Any]] = {
    "all": {
        "config": AdapterConfig(8, 16, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    },
    "rs": {"config": AdapterConfig(8, 12, ("q_proj", "v_proj"), rslora=True)},
    "mixed": {
        "config": AdapterConfig(
            3, 6, ("k_proj", "gate_proj", "down_proj"), rank_pattern={"down_proj": 5}, alpha_pattern={"gate_proj": 9}
        )
    },
    "wide": {"config": AdapterConfig(16, 16, ("o_proj",))},
    "vast": {"config": AdapterConfig(65, 65, ("o_proj",))},
    "phantom": {"config": AdapterConfig(8, 16, ("q_proj",)), "others": (PHANTOM,)},
    "foreign": {"config": AdapterConfig(8, 16, ("q_proj",)), "prefix": "language_model."},
}

OURS = ("all", "rs", "mixed", "wide")
"""Those that both engines take."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vllm: needs vLLM's environment; `make test-vllm` makes it")


@pytest.fixture(scope="session")
def vllm_python() -> str:
    if not VLLM_PYTHON:
        pytest.skip("needs vLLM's environment: make test-vllm")
    return VLLM_PYTHON


@pytest.fixture(scope="session")
def base(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama-wide")


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each of `SHAPES`, each with an effect."""
    return {
        name: _write(base, tmp_path_factory.mktemp(name), seed=number, **shape)
        for number, (name, shape) in enumerate(SHAPES.items())
    }


def _write(
    base: Path, directory: Path, seed: int, config: AdapterConfig, others: Sequence[str] = (), prefix: str = ""
) -> Path:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    linears = base_modules(base)
    for module in [*(n for n in sorted(linears) if n.rpartition(".")[2] in config.target_modules), *others]:
        out_features, in_features = linears.get(module, (512, 512))
        rank = config.rank_of(module)
        a = torch.randn(rank, in_features, generator=generator) * in_features**-0.5
        tensors[f"{prefix}{module}.lora_A.weight"] = a
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(out_features, rank, generator=generator) * 0.3
    write_adapter(directory, config, tensors)
    return directory


@dataclass
class Done:
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish: FinishReason | None = None
    usage: Usage | None = None

    def add(self, event: TokenEvent) -> None:
        self.tokens += event.tokens
        self.pieces.append(event.text)
        self.finish, self.usage = event.finish, event.usage

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture(scope="session")
def ours(base: Path, adapters: dict[str, Path]) -> Callable[[Sequence[GenerateRequest]], list[Done]]:
    """What our own engine answers, all adapters that it takes being loaded."""
    from orchestrator.modeling.loading import load_model
    from orchestrator.modeling.prompts import end_tokens, load_tokenizer
    from serving.engine.core import EngineCore, answers
    from serving.engine.network import ServedNetwork
    from serving.engine.scheduler import Limits

    tokenizer = load_tokenizer(base)
    network = ServedNetwork(load_model(base, dtype=torch.float32).eval())
    core = EngineCore(network, tokenizer, end_tokens(tokenizer), Limits(max_length=512))
    for name in OURS:
        core.load(name, adapters[name])

    def ask(requests: Sequence[GenerateRequest]) -> list[Done]:
        done = {request.id: Done() for request in requests}
        for request in requests:
            core.add(request)
        for delivery in answers(core):
            assert delivery.error is None, delivery.error
            done[delivery.request_id].add(delivery.event)
        return list(done.values())

    return ask


@pytest.fixture(scope="session")
def greedy() -> Callable[..., GenerateRequest]:
    def make(prompt: Sequence[int], adapter: str | None = None, new: int = 16, **sampling: Any) -> GenerateRequest:
        return GenerateRequest(tuple(prompt), adapter, Sampling(max_tokens=new, **{"ignore_end": True} | sampling))

    return make


class Driver:
    """An engine and the event loop in which all tests use it."""

    def __init__(self, base: Path, adapters: dict[str, Path], **limits: Any):
        from serving.engine.prepared import Place
        from serving.engine.vllm import VllmEngine, VllmLimits

        self.adapters = adapters
        places = {name: Place(name, 0, *shape) for name, shape in base_modules(base).items()}
        places[PHANTOM] = Place(PHANTOM, 0, 512, 512)
        sizes = {"max_sequences": 8, "max_length": 512, "max_waiting": 4, "max_adapters": 4, "batch_adapters": 2}
        sizes |= {"max_rank": 8, "cache_bytes": 64 << 20, "eager": True}
        self.died = 0
        self._runner = asyncio.Runner()
        self.engine: VllmEngine = self.run(
            _made(lambda: VllmEngine(base, places, torch.float32, VllmLimits(**sizes | limits), self._count))
        )

    def _count(self) -> None:
        self.died += 1

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(coroutine, timeout=600))

    async def ask(self, request: GenerateRequest) -> Done:
        done = Done()
        async for event in self.engine.generate(request):
            done.add(event)
        return done

    async def ask_all(self, requests: Sequence[GenerateRequest]) -> list[Done]:
        return list(await asyncio.gather(*map(self.ask, requests)))

    async def load(self, *names: str) -> None:
        for name in names:
            await self.engine.load_adapter(name, self.adapters[name])

    async def loaded(self) -> set[str]:
        """Adapters that vLLM itself says it has."""
        numbers = await self.engine._llm.list_loras()
        return {name for name, number in self.engine._numbers.items() if number in numbers} - {"base"}

    async def unload_all(self) -> None:
        for name in self.engine.stats().adapters:
            await self.engine.unload_adapter(name)

    def close(self) -> None:
        self.run(self.engine.close())
        self._runner.close()


async def _made(make: Callable[[], T]) -> T:
    return make()


@pytest.fixture(scope="session")
def _driver(base: Path, adapters: dict[str, Path]) -> Iterator[Driver]:
    driver = Driver(base, adapters)
    yield driver
    driver.close()


@pytest.fixture
def vllm(_driver: Driver) -> Iterator[Driver]:
    """The engine of all tests, with no adapter loaded."""
    yield _driver
    _driver.run(_driver.unload_all())


@pytest.fixture
def fresh_vllm(base: Path, adapters: dict[str, Path]) -> Iterator[Driver]:
    """One of its own, for a test that ends it."""
    driver = Driver(base, adapters)
    yield driver
    driver.close()
