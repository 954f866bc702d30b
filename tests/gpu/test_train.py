"""A fine-tune on a GPU, by the worker that Ray Train starts: what it learns, resumes, publishes, and says when memory runs out."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.train.packing import forward, pack
from jobs.train.setup import Place, micro_batch_tokens
from orchestrator.errors import OutOfMemory
from orchestrator.modeling.decoder import adapter_parameters, add_adapter
from orchestrator.modeling.dtypes import DTYPES
from orchestrator.modeling.loading import load_model
from orchestrator.modeling.lora import LoraShape
from orchestrator.runs.states import RunState
from orchestrator.spec.job import TrainSpec
from tests.integration.test_worker import (
    test_any_other_decoder_trains_on_the_plain_path,
    test_every_architecture_trains,
    test_it_learns_publishes_and_evaluates,
    test_killed_in_the_middle_it_ends_with_the_same_digest,
    test_stock_peft_gives_the_same_logits,
)
from tests.unit.train.test_loop import LENGTHS, trained

__all__ = [
    "test_any_other_decoder_trains_on_the_plain_path",
    "test_every_architecture_trains",
    "test_it_learns_publishes_and_evaluates",
    "test_killed_in_the_middle_it_ends_with_the_same_digest",
    "test_stock_peft_gives_the_same_logits",
]

NEEDS = {"full": "deepspeed", "qlora": "bitsandbytes"}


@pytest.fixture(scope="module")
def process_group(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of one worker, as Ray Train makes it where there is a GPU: DeepSpeed asks for one."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    backend = "nccl" if device == "cuda" else "gloo"
    patch = pytest.MonkeyPatch()
    patch.setenv("LOCAL_RANK", "0")
    torch.distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    patch.undo()


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest, device: str) -> None:
    for word, package in NEEDS.items():
        if re.search(rf"\b{word}\b", request.node.name):
            pytest.importorskip(package, reason=f"{package} is not installed: pip install 'adaptory[deepspeed,qlora]'")
    if device == "cuda" and re.search(r"\bfull\b", request.node.name):
        request.getfixturevalue("process_group")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_losses_are_those_of_a_cpu(tiny_model: Any, make_rows: Any, device: str, architecture: str) -> None:
    """fp32: losses within 1e-5 at each of five steps, weights within 5e-4."""
    rows, directory = make_rows(LENGTHS), tiny_model(architecture)
    losses, weights = trained(directory, rows)
    found, found_weights = trained(directory, rows, device=device)
    assert found == pytest.approx(losses, abs=1e-5)
    for name in weights:
        torch.testing.assert_close(found_weights[name], weights[name], atol=5e-4, rtol=0)


def test_peak_memory_is_the_gpus(make_job: Any, cuda: torch.device) -> None:
    torch.cuda.reset_peak_memory_stats()
    job = make_job("llama-wide")
    base = sum(file.stat().st_size for file in Path(job.resolved.base_model).glob("*.safetensors"))
    metrics = job.work().metrics
    assert base < metrics["peak_memory_bytes"] <= torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_micro_batch_that_auto_chooses_fits(
    tiny_model: Any, make_rows: Any, cuda: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: Any, recompute: bool
) -> None:
    """Were so much free, the largest micro-batch would take at most all of it, and at least a sixth."""
    free = 600 * 2**20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    network = load_model(tiny_model("llama-wide"), dtype=DTYPES[dtype], device=cuda)
    add_adapter(network, "tuned", LoraShape(8, 16.0), seed=0)
    for parameter in adapter_parameters(network, "tuned").values():
        parameter.requires_grad_(True)
    network.gradient_checkpointing = recompute
    spec = TrainSpec(dtype=dtype, gradient_checkpointing=recompute)
    tokens = micro_batch_tokens(spec, network, Place(device=cuda), 400)
    assert tokens < 16384, "or it would not be the memory that decides"
    rows = make_rows([400] * (tokens // 400))
    batch = pack(rows, range(len(rows)), 1, cuda)
    forward(network, batch, "tuned")[0].backward()  # what libraries keep is not the micro-batch's
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward(network, batch, "tuned")[0].backward()
    assert free / 6 < torch.cuda.max_memory_allocated() - before < free


@pytest.mark.parametrize(
    ("phase", "message", "hint"),
    [
        ("building", r"Out of memory while building \([\d.]+ .iB more were wanted\)", "tuning.rank"),
        (
            "training",
            r"Out of memory in a micro-batch of \d+ tokens \(longest row \d+\) \([\d.]+ .iB more were wanted\)",
            "train.micro_batch_tokens to",
        ),
    ],
)
def test_a_full_gpu_is_a_typed_error_and_leaves_nothing_behind(
    make_job: Any, heard: Any, cuda: torch.device, phase: str, message: str, hint: str
) -> None:
    """Somebody else takes all but 4 MiB of it when the phase begins. When they are gone, the run goes on in this process."""
    job, others = make_job("llama-wide", train={"micro_batch_tokens": 2048}), []

    class Said(heard):
        def emit(self, type: str, message: str = "", **data: Any) -> None:
            if type == "phase" and data["phase"] == phase:
                torch.cuda.empty_cache()
                others.append(torch.empty(torch.cuda.mem_get_info()[0] - 4 * 2**20, dtype=torch.uint8, device=cuda))
            super().emit(type, message, **data)

    result = job.work(Said())
    assert others
    assert result.state is RunState.FAILED
    assert result.error["code"] == OutOfMemory.code
    assert re.match(message, result.error["message"]), result.error["message"]
    assert hint in result.error["hint"]
    others.clear()
    torch.cuda.empty_cache()
    deadline = time.monotonic() + 10  # a driver may take a while to give so much back
    while (free := torch.cuda.mem_get_info()[0]) < 2**30 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert free > 2**30
    assert job.work(attempt=2).state is RunState.SUCCEEDED
