"""Tiny engines, and adapters that PEFT itself has written for their bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.modeling.loading import load_model
from serving.engine.core import EngineCore, answers
from serving.engine.network import ServedNetwork
from serving.engine.protocol import FinishReason, GenerateRequest, Sampling, Usage
from serving.engine.scheduler import Limits

NOTHING_ENDS = frozenset[int]()

SHAPES: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    {"r": 8, "lora_alpha": 12, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 6, "target_modules": ["k_proj", "down_proj", "gate_proj"], "rank_pattern": {"down_proj": 5}},
)
"""Mixed ranks, scales and targets, so that no two adapters have the same layout."""


@pytest.fixture(scope="session")
def peft_adapters(tiny_model, tmp_path_factory) -> Callable[[str], list[Path]]:
    """`peft_adapters("llama")` → directories of three adapters with an effect, of `SHAPES`."""
    made: dict[str, list[Path]] = {}

    def make(architecture: str) -> list[Path]:
        if architecture not in made:
            made[architecture] = [
                _write_adapter(tiny_model(architecture), tmp_path_factory.mktemp(f"adapter-{n}"), shape, seed=n)
                for n, shape in enumerate(SHAPES)
            ]
        return made[architecture]

    return make


def _write_adapter(base: Path, directory: Path, shape: dict[str, Any], seed: int) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **shape))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def make_engine(tiny_model, device) -> Callable[..., EngineCore]:
    """`make_engine("llama", cache_tokens=…)` → an engine in fp32 whose answers end by their length only, and whose clock stands
    still."""

    def make(
        architecture: str = "llama",
        end: frozenset[int] = NOTHING_ENDS,
        dtype: Any = torch.float32,
        pack: bool | None = None,
        fuse: bool = True,
        clock: Callable[[], float] = lambda: 0.0,
        **limits: Any,
    ) -> EngineCore:
        directory = tiny_model(architecture)
        sizes = {"cache_tokens": 4096, "max_sequences": 16, "batch_tokens": 64, "block_size": 16} | limits
        network = ServedNetwork(load_model(directory, dtype=dtype, device=device).eval(), pack, fuse=fuse)
        return EngineCore(network, AutoTokenizer.from_pretrained(directory), end, Limits(**sizes), clock)

    return make


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    """Shorter than a block, one block and a token, several blocks, longer than every window and a step's budget."""
    return [tuple(range(5 + n, 5 + n + length)) for n, length in enumerate((3, 17, 41, 1, 80, 33))]


@pytest.fixture(scope="session")
def greedy() -> Callable[..., GenerateRequest]:
    def make(prompt: Sequence[int], adapter: str | None = None, new: int = 12, **sampling: Any) -> GenerateRequest:
        return GenerateRequest(tuple(prompt), adapter, Sampling(max_tokens=new, **sampling))

    return make


@pytest.fixture(scope="session")
def run() -> Callable[[EngineCore, Sequence[GenerateRequest]], list[Done]]:
    """Each request's answer, all of them asked at once."""

    def ask(core: EngineCore, requests: Sequence[GenerateRequest]) -> list[Done]:
        done = {request.id: Done() for request in requests}
        for request in requests:
            core.add(request)
        for delivery in answers(core):
            if delivery.error is not None:
                raise delivery.error
            event, answer = delivery.event, done[delivery.request_id]
            answer.tokens += event.tokens
            answer.pieces.append(event.text)
            answer.finish, answer.usage = event.finish, event.usage
        return list(done.values())

    return ask


@dataclass
class Done:
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish: FinishReason | None = None
    usage: Usage | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture(scope="session")
def stock(tiny_model, device) -> Callable[..., Any]:
    """`stock("llama", adapter)` → transformers' model in fp32, with PEFT's adapter on it if there is one."""

    def load(architecture: str, adapter: Path | None = None) -> Any:
        directory = tiny_model(architecture)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval().to(device)

    return load
