"""Speed and memory on one GPU, in bf16, of networks with true shapes and random weights. `python tests/gpu/speed.py`; two minutes.

Training is paired with plain transformers + PEFT on the same rows: padded, SDPA, a row of the batch for each row. Rows have 200
to 800 tokens, of which the second half carries loss; a step is eight rows under LoRA of rank 16 on all linears.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.data.rows import Tokens
from jobs.sweep.packed import PackedGroup
from jobs.train.batches import Batches
from jobs.train.engines import SingleEngine
from jobs.train.loop import SLOT, Hooks, train
from jobs.train.setup import Place, micro_batch_tokens
from jobs.train.steps import Progress
from orchestrator.modeling.adapter_files import AdapterConfig, write_adapter
from orchestrator.modeling.architecture import fused_architecture
from orchestrator.modeling.attention import AttentionShape, Documents
from orchestrator.modeling.decoder import Decoder, adapter_parameters, add_adapter, remove_adapter
from orchestrator.modeling.lora import LoraShape
from orchestrator.spec.job import JobSpec, TrainSpec
from serving.engine.core import EngineCore, answers
from serving.engine.network import ServedNetwork
from serving.engine.protocol import GenerateRequest, Sampling
from serving.engine.scheduler import Limits
from tests.unit.train.conftest import MadeRows

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    },
}  # fmt: skip
RANK, ROWS_A_STEP, WARMUP, STEPS, RATE = 16, 8, 5, 20, 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Side = tuple[float, float, list[float]]
"""Real tokens a second, GiB of GPU memory at the peak, losses."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["smollm2-135m", "qwen2.5-1.5b"], choices=list(SHAPES))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="directory for the profiler's tables")
    options = parser.parse_args()
    device = torch.device(options.device)
    for shape in options.shapes:
        theirs = stock(shape, device)
        for part in options.parts:
            PARTS[part](shape, theirs, device, options.out)
        del theirs


# --- what is measured -----------------------------------------------------------------------------------------------


def attention(shape: str, theirs: Any, device: torch.device, out: Path | None) -> None:
    """Forward and backward of one layer's attention, by kernel."""
    a = theirs.config
    dim = a.hidden_size // a.num_attention_heads
    heads = AttentionShape(a.num_attention_heads, a.num_key_value_heads, dim, dim**-0.5)
    rows = made_rows(1, a.vocab_size)
    lengths = [len(rows[n].ids) for n in range(ROWS_A_STEP)]
    for dtype in (torch.bfloat16, torch.float32):
        width = heads.heads + 2 * heads.kv_heads
        qkv = torch.randn(sum(lengths), width, dim, device=device, dtype=dtype, requires_grad=True)
        wanted = torch.randn(sum(lengths), heads.heads * dim, device=device, dtype=dtype)
        for kernel in ("flash", "matmul") if dtype is torch.bfloat16 else ("matmul",):
            documents = Documents(lengths, device, kernel)

            def once(documents: Documents = documents, qkv: Tensor = qkv, wanted: Tensor = wanted) -> None:
                torch.autograd.grad(documents(0, qkv, heads, None), qkv, wanted)

            say("attention", shape, dtype=str(dtype), kernel=kernel, ms=1000 * timed(once, 20, device))


def training(shape: str, theirs: Any, device: torch.device, out: Path | None) -> None:
    """Ours and theirs in turn, three times over the same rows, of which the first is to warm up."""
    rows = made_rows(WARMUP + STEPS, theirs.config.vocab_size)
    sides: dict[str, list[Side]] = {"ours": [], "peft": []}
    for _ in range(3):
        sides["ours"].append(ours(theirs, rows, device))
        sides["peft"].append(peft(theirs, rows, device))
    for name, found in sides.items():
        for speed, memory, losses in found:
            say(
                "training",
                shape,
                side=name,
                tokens_per_second=speed,
                gib=memory,
                first_loss=losses[0],
                last_loss=losses[-1],
            )
    ratios = [mine[0] / plain[0] for mine, plain in zip(sides["ours"][1:], sides["peft"][1:], strict=True)]
    say("training", shape, ratio=sum(ratios) / len(ratios), memory_ratio=sides["ours"][-1][1] / sides["peft"][-1][1])
    for _ in range(2):
        many = ours(theirs, made_rows(4 * (WARMUP + 5), theirs.config.vocab_size), device, 4 * ROWS_A_STEP, 5)
        say("training", shape, side="ours, 32 rows a step", tokens_per_second=many[0], gib=many[1])


def profile(shape: str, theirs: Any, device: torch.device, out: Path | None) -> None:
    """The kernels of our steps, by time."""
    rows = made_rows(WARMUP + 3, theirs.config.vocab_size)
    ours(theirs, rows, device, steps=3)
    with profiled(device, out, f"training-{shape}"):
        ours(theirs, rows, device, steps=3)


@contextlib.contextmanager
def profiled(device: torch.device, out: Path | None, name: str) -> Iterator[None]:
    from torch.profiler import ProfilerActivity, profile

    if out is None:
        yield
        return
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as seen:
        yield
    orders = ["self_cpu_time_total", *(["self_cuda_time_total"] if device.type == "cuda" else [])]
    tables = [seen.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90) for by in orders]
    (out / f"{name}.txt").write_text("\n".join(tables))


def lanes(shape: str, theirs: Any, device: torch.device, out: Path | None) -> None:
    """A packed group of one trial and of eight; the first round of each to warm up."""
    rows, decoder = made_rows(WARMUP + 6, theirs.config.vocab_size), decoder_of(theirs)
    for count in (1, 1, 8, 8):
        group = PackedGroup(decoder, rows, None, Place(device=device), tokens_at_once=16384, lanes=count)
        for n in range(count):
            train = {"learning_rate": RATE * (n + 1), "seed": n, "batch_size": ROWS_A_STEP, "schedule": "constant"}
            tuning = {"type": "lora", "rank": RANK, "alpha": 2 * RANK}
            spec = {"name": "t", "base_model": "b", "data": {"train": "r"}, "train": train, "tuning": tuning}
            group.open(f"t{n}", JobSpec.model_validate(spec))
        for _ in range(WARMUP):
            group.step()
        done, watch = group.computed.tokens, Watch(device)
        for _ in range(4):
            group.step()
        seconds, memory = watch.stop()
        say("lanes", shape, lanes=count, tokens_per_second=(group.computed.tokens - done) / seconds, gib=memory)
        for n in range(count):
            group.close(f"t{n}")


def decoding(shape: str, theirs: Any, device: torch.device, out: Path | None) -> None:
    """Requests of 128 tokens over eight adapters, 64 new tokens each: tokens a second once all have begun."""
    core = engine_of(theirs)
    for count in (1, 16, 64):
        for _ in range(2):  # the first to warm up
            ask(core, count)
            watch = Watch(device)
            tokens = sum(len(delivery.event.tokens) for delivery in answers(core) if delivery.event)
            seconds, memory = watch.stop()
        say("decoding", shape, requests=count, tokens_per_second=tokens / seconds, gib=memory)
    with profiled(device, out, f"decoding-{shape}"):
        ask(core, 16)
        for _ in range(10):
            core.step()


def ask(core: EngineCore, count: int) -> None:
    """As many requests, their prompts read."""
    for n in range(count):
        prompt = np.random.default_rng(n).integers(4, core.network.architecture.vocab_size, 128).tolist()
        core.add(GenerateRequest(tuple(prompt), f"sha256:{n % 8}", Sampling(max_tokens=64)))
    core.step()


def engine_of(theirs: Any) -> EngineCore:
    """With eight adapters."""
    network = ServedNetwork(decoder_of(theirs).eval())
    core = EngineCore(network, Silent(), frozenset(), Limits(cache_tokens=32_768, batch_tokens=8192))
    with tempfile.TemporaryDirectory() as folder:
        for n in range(8):
            core.load(f"sha256:{n}", made_adapter(theirs, Path(folder) / str(n), n))
    return core


PARTS: dict[str, Callable[[str, Any, torch.device, Path | None], None]] = {
    "attention": attention, "training": training, "profile": profile, "lanes": lanes, "decoding": decoding,
}  # fmt: skip


# --- the two sides of training --------------------------------------------------------------------------------------


def ours(theirs: Any, rows: MadeRows, device: torch.device, batch: int = ROWS_A_STEP, steps: int = STEPS) -> Side:
    """`jobs.train.loop` as a run takes it, the size of its micro-batches included."""
    decoder, ends, losses = decoder_of(theirs), [], []
    add_adapter(decoder, SLOT, LoraShape(RANK, 2.0 * RANK), seed=0)
    parameters = adapter_parameters(decoder, SLOT)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    spec, place = TrainSpec(learning_rate=RATE, batch_size=batch), Place(device=device)
    tokens = micro_batch_tokens(spec, decoder, place, int(max(rows.lengths)))
    batches = InOrder(
        rows.lengths, batch_size=batch, epochs=1, seed=0, micro_batch_tokens=tokens, max_steps=WARMUP + steps
    )
    watch = Watch(device)

    def on_step(progress: Progress) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append((time.perf_counter(), progress.tokens))
        losses.append(progress.loss)

    train(
        decoder, SingleEngine(parameters, spec), rows, batches, lambda step: RATE, seed=0,
        progress=Progress(0, batches.total_steps), hooks=Hooks(on_step=on_step), device=device,
    )  # fmt: skip
    remove_adapter(decoder, SLOT)
    (began, before), (ended, after) = ends[WARMUP - 1], ends[-1]
    return (after - before) / (ended - began), watch.stop()[1], losses


def peft(theirs: Any, rows: MadeRows, device: torch.device) -> Side:
    """A loop of plain torch over transformers and PEFT, adapters in the dtype of the base."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(theirs, config, autocast_adapter_dtype=False).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE, fused=device.type == "cuda"), []
    watch, began, tokens = Watch(device), 0.0, 0
    for step in range(WARMUP + STEPS):
        if step == WARMUP:
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
        ids, mask, labels = (part.to(device) for part in padded(rows, step))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tokens += int(mask.sum()) if step >= WARMUP else 0
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, memory = time.perf_counter() - began, watch.stop()[1]
    model.unload()
    return tokens / seconds, memory, losses


def padded(rows: MadeRows, step: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = [rows[row] for row in range(step * ROWS_A_STEP, (step + 1) * ROWS_A_STEP)]
    longest = max(len(row.ids) for row in chosen)
    ids, mask, labels = (torch.full((len(chosen), longest), fill) for fill in (0, 0, -100))
    for n, row in enumerate(chosen):
        ids[n, : len(row.ids)] = torch.from_numpy(row.ids)
        mask[n, : len(row.ids)] = 1
        labels[n, : len(row.ids)] = torch.where(torch.from_numpy(row.loss_mask), torch.from_numpy(row.ids), -100)
    return ids, mask, labels


class InOrder(Batches):
    """Steps over the rows as they stand, so that the other side can see the same ones."""

    def rows(self, step: int) -> list[int]:
        return list(range(step * self.batch_size, min((step + 1) * self.batch_size, len(self._lengths))))


# --- what they need -------------------------------------------------------------------------------------------------


def stock(shape: str, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(SHAPES[shape])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, pad_token_id=0, use_cache=False)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def decoder_of(theirs: Any) -> Decoder:
    """Ours with the same weights, copied."""
    weights, architecture = theirs.state_dict(), fused_architecture(theirs.config)
    assert architecture is not None
    return Decoder(architecture, weights.__getitem__)


def made_rows(steps: int, vocab: int) -> MadeRows:
    random, rows = np.random.default_rng(0), []
    for _ in range(steps * ROWS_A_STEP):
        ids = random.integers(4, vocab, random.integers(200, 801)).astype(np.int32)
        rows.append(Tokens(ids, np.arange(len(ids)) >= len(ids) // 2))
    return MadeRows(rows)


def made_adapter(theirs: Any, directory: Path, seed: int) -> Path:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in theirs.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            out_features, in_features = module.weight.shape
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, in_features, generator=generator) * in_features**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out_features, RANK, generator=generator) * 0.01
    write_adapter(directory, AdapterConfig(RANK, 2 * RANK, TARGETS), tensors)
    return directory


class Silent:
    """A tokenizer whose tokens have no text: words are not what is measured."""

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


class Watch:
    """Seconds, and GiB of GPU memory at the peak."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        if self._cuda:
            torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated() / 2**30 if self._cuda else 0.0
        return time.perf_counter() - self._began, memory


def timed(once: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds of one call, the mean of many."""
    for _ in range(3):
        once()
    watch = Watch(device)
    for _ in range(repeats):
        once()
    return watch.stop()[0] / repeats


def say(part: str, shape: str, **found: Any) -> None:
    short = {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}
    print(json.dumps({"part": part, "shape": shape} | short), flush=True)


if __name__ == "__main__":
    main()
