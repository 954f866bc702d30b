"""A whole fine-tune on one worker, without Ray: train, checkpoint, resume, publish, evaluate. About a minute.

Digests are over the weights' bytes, so equal digests are equality to the last digit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jobs.train.artifact import load_adapter
from jobs.train.loop import SLOT
from orchestrator.errors import DiskFull, ModelError, OutOfMemory, TrainingDiverged
from orchestrator.modeling.loading import load_model
from orchestrator.registry.adapters import AdapterSummary
from orchestrator.runs.result import RunResult
from orchestrator.runs.states import RunState
from orchestrator.store import Store, adapter_path, attempt_path, checkpoints_path, control_path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4},
    "rslora": {"type": "lora", "rank": 4, "rslora": True, "dropout": 0.1, "targets": ["q_proj", "v_proj", "down_proj"]},
    "qlora": {"type": "qlora", "rank": 4},
    "full": {"type": "full"},
}
EVALUATE = {"metrics": ["exact_match", "json_valid", "entity_f1"], "max_new_tokens": 4, "rows": 3}
Make = Callable[..., Any]


def logits_of_ours(base: Path, ids: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    model = load_model(base, dtype=torch.float32).eval()
    if adapter:
        load_adapter(model, SLOT, adapter)
    with torch.no_grad():
        return model.logits(ids, torch.arange(len(ids)), SLOT if adapter else None)


@pytest.mark.parametrize("tuning", list(TUNINGS))
def test_it_learns_publishes_and_evaluates(make_job: Make, heard: Any, tuning: str) -> None:
    job = make_job(tuning=TUNINGS[tuning], evaluate=EVALUATE)
    said = heard()
    result = job.work(said)
    assert result.state is RunState.SUCCEEDED, result.error
    assert said.steps == list(range(1, 9))
    assert said.losses[-1] < said.losses[0] - 0.5
    metrics = result.metrics
    assert metrics["steps"] == 8
    assert metrics["train_loss"] == said.losses[-1]
    assert metrics["validation_loss"] < said.losses[0]
    assert metrics["tokens"] > 32 * 2 * 10
    assert result.evaluation is not None
    assert result.evaluation.rows == 3
    assert result.evaluation.after.keys() == {"exact_match", "json_valid", "entity_f1"}
    assert len(result.evaluation.samples) == 3
    assert {"loading", "preparing", "building", "training", "publishing", "evaluating"} <= result.seconds.keys()
    manifest = job.store.manifest(adapter_path(result.adapter))
    summary = AdapterSummary.model_validate(manifest.metadata)
    assert summary.metrics["probe_effect"] > 0.1
    assert (summary.kind, summary.step) == ("full" if tuning == "full" else "lora", 8)
    assert summary.base_model == job.resolved.spec.base_model


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_base_is_asked_with_training_rows_before_each_question_too(make_job: Make, heard: Any, tuning: str) -> None:
    def evaluated(name: str, **baseline: Any) -> Any:
        result = make_job(name=name, tuning=TUNINGS[tuning], evaluate=EVALUATE | baseline).work(said := heard())
        assert result.state is RunState.SUCCEEDED, result.error
        return result.evaluation, [data["done"] for kind, _, data in said.lines if kind == "progress" if data["total"]]

    bare, done = evaluated("bare")
    assert (bare.few_shot, bare.examples, done) == (None, 0.0, list(range(7)))
    shown, done = evaluated("shown", baseline={"few_shot": 2})
    assert (shown.few_shot.keys(), shown.examples, done) == (bare.after.keys(), 2.0, list(range(10)))
    assert [(one.before, one.after) for one in shown.samples] == [(one.before, one.after) for one in bare.samples]
    assert [one.few_shot for one in shown.samples] != [one.before for one in shown.samples]


@pytest.mark.parametrize("tuning", ["lora", "rslora"])
def test_stock_peft_gives_the_same_logits(make_job: Make, tmp_path: Path, tuning: str) -> None:
    """fp32, within 1e-4."""
    from peft import PeftModel

    job = make_job(tuning=TUNINGS[tuning])
    base = Path(job.resolved.base_model)
    directory = job.fetched(job.work().adapter, tmp_path / "adapter")
    ids = torch.arange(4, 44)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(directory))
    with torch.no_grad():
        theirs = model.eval()(ids[None]).logits[0]
    torch.testing.assert_close(logits_of_ours(base, ids, directory), theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - logits_of_ours(base, ids)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text"])
def test_plain_transformers_loads_full_weights(make_job: Make, tmp_path: Path, architecture: str) -> None:
    """fp32, within 2e-4; tokenizer and chat template come with them."""
    from transformers import AutoTokenizer

    job = make_job(architecture, tuning={"type": "full"}, train={"max_steps": 2})
    directory = job.fetched(job.work().adapter, tmp_path / "weights")
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    theirs, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(4, 44)
    with torch.no_grad():
        logits = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits_of_ours(directory, ids), logits, atol=2e-4, rtol=1e-4)
    assert (logits - logits_of_ours(Path(job.resolved.base_model), ids)).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(directory).chat_template


# --- interrupted and resumed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuning", "train"),
    [("lora", {}), ("rslora", {}), ("lora", {"dtype": "bfloat16"}), ("qlora", {}), ("full", {"schedule": "linear"})],
    ids=["lora", "dropout", "bfloat16", "qlora", "full"],
)
def test_killed_in_the_middle_it_ends_with_the_same_digest(
    make_job: Make, heard: Any, killed: Any, tuning: str, train: dict[str, Any]
) -> None:
    undisturbed = make_job(name="undisturbed", tuning=TUNINGS[tuning], train=train)
    whole = heard()
    expected = undisturbed.work(whole).adapter
    job = make_job(name="disturbed", tuning=TUNINGS[tuning], train=train)
    first = heard(kill_after=5)  # the checkpoints of steps 2 and 4 are there, step 5 is lost
    with pytest.raises(killed):
        job.work(first)
    second = heard()
    result = job.work(second, attempt=2)
    assert second.steps == [5, 6, 7, 8]
    assert first.losses + second.losses[1:] == whole.losses
    assert result.adapter == expected
    assert result.metrics["validation_loss"] == undisturbed.work(attempt=3).metrics["validation_loss"]


def test_pausing_writes_a_checkpoint_and_resuming_gives_the_same_digest(make_job: Make, heard: Any) -> None:
    expected = make_job(name="undisturbed").work().adapter
    job = make_job(name="paused", train={"checkpoint": {"every": 100}})
    job.store.write_json(control_path(job.resolved.run, 1), {"action": "pause"})
    said = heard()
    result = job.work(said)
    assert (result.state, result.adapter, said.steps) == (RunState.PAUSED, None, [1])
    assert [int(name) for name in job.store.children(checkpoints_path(job.resolved.run))] == [1]
    assert job.work(attempt=2).adapter == expected


def test_cancelling_ends_without_an_adapter(make_job: Make) -> None:
    job = make_job()
    job.store.write_json(control_path(job.resolved.run, 1), {"action": "cancel"})
    result = job.work()
    assert (result.state, result.adapter) == (RunState.CANCELLED, None)
    assert job.store.children("adapters") == []


def test_an_attempt_that_was_replaced_publishes_nothing(make_job: Make) -> None:
    job = make_job()
    job.store.write_json(attempt_path(job.resolved.run), {"attempt": 2})
    assert job.work(attempt=1).adapter is None
    assert job.store.children("adapters") == []
    assert job.store.children(checkpoints_path(job.resolved.run)) == []
    assert job.work(attempt=2).state is RunState.SUCCEEDED


def test_divergence_fails_with_its_step_and_keeps_the_last_good_checkpoint(
    make_job: Make, heard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.train import loop

    calculate, said = loop.forward, heard()

    def breaks(model: Any, *arguments: Any) -> Any:
        loss, losses = calculate(model, *arguments)
        return (loss * float("nan") if len(said.steps) == 4 and model.training else loss), losses

    monkeypatch.setattr(loop, "forward", breaks)
    job = make_job()
    result = job.work(said)
    assert result.state is RunState.FAILED
    assert result.error["code"] == TrainingDiverged.code
    assert "step 5" in result.error["message"]
    monkeypatch.setattr(loop, "forward", calculate)
    assert job.work(attempt=2).adapter == make_job(name="undisturbed").work().adapter


# --- the machine runs out -------------------------------------------------------------------------------------------


def test_a_disk_that_fills_and_stays_full_ends_the_run_and_loses_nothing(
    make_job: Make, heard: Any, small_disk: Any
) -> None:
    expected = make_job(name="undisturbed").work().adapter
    job = make_job(name="full", store=str(small_disk.path / "store"))
    said = heard(then={3: small_disk.fill})  # the checkpoint of step 2 is there, those of 4, 6 and 8 find no room
    result = job.work(said)
    assert result.state is RunState.FAILED
    assert result.error["code"] == DiskFull.code
    assert f"There is no room for {small_disk.path}/store/adapters/" in result.error["message"]
    assert result.error["free"] < 2**16
    assert "adaptory runs resume" in result.error["hint"]
    assert said.steps == list(range(1, 9))
    failed = [line for line in said.messages if "could not be saved; the run goes on" in line]
    assert len(failed) == 3
    assert all("16.0 MiB are free" in line for line in failed)
    assert [int(name) for name in job.store.children(checkpoints_path(job.resolved.run))] == [2]
    small_disk.free()
    again = heard()
    assert job.work(again, attempt=2).adapter == expected
    assert again.steps == [3, 4, 5, 6, 7, 8]


LIMITED = """
import resource, sys
from pathlib import Path
from jobs.train.session import Session
from jobs.train.setup import Place, use_threads
from jobs.train.worker import run_worker
from orchestrator.spec.resolved import ResolvedSpec
from orchestrator.store import Store, spec_path

url, cache, run, phase = sys.argv[1:]

class Events:
    def emit(self, type, message="", **data):
        if type == "phase" and data["phase"] == phase:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**20, resource.RLIM_INFINITY))

    def flush(self):
        pass

use_threads(1)
store = Store(url)
resolved = ResolvedSpec.model_validate(store.read_json(spec_path(run)))
result = run_worker(Session(resolved, 1, store, Path(cache), Place(), Events()))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(result.model_dump_json())
"""


@pytest.mark.parametrize(
    ("phase", "message", "hint"),
    [
        ("building", "Out of memory while building", "tuning.rank"),
        (
            "training",
            r"Out of memory in a micro-batch of \d+ tokens \(longest row \d+\)",
            "train.micro_batch_tokens to",
        ),
    ],
)
def test_memory_that_runs_out_is_a_typed_error_that_names_what_to_lower(
    make_job: Make, phase: str, message: str, hint: str
) -> None:
    """A process whose address space ends 8 MiB above what it has when the phase begins. A step over all 32 rows
    takes far more than what the allocator may have kept from building."""
    job = make_job("llama-wide", train={"micro_batch_tokens": 2048, "batch_size": 32})
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, job.store.url, str(job.cache), job.resolved.run, phase],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = RunResult.model_validate_json(done.stdout.splitlines()[-1])
    assert result.state is RunState.FAILED
    assert result.error is not None
    assert result.error["code"] == OutOfMemory.code, result.error
    assert re.match(message, result.error["message"])
    assert hint in result.error["hint"]
    assert "Traceback" not in done.stdout + done.stderr


# --- every kind of model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains(make_job: Make, heard: Any, architecture: str) -> None:
    """In bf16, as by default."""
    said = heard()
    job = make_job(architecture, train={"max_steps": 2, "dtype": "bfloat16", "checkpoint": {"every": "auto"}})
    result = job.work(said)
    assert result.state is RunState.SUCCEEDED, result.error
    assert said.losses[1] < said.losses[0] + 0.2
    assert job.store.manifest(adapter_path(result.adapter)).metadata["metrics"]["probe_effect"] > 0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_any_other_decoder_trains_on_the_plain_path(
    make_job: Make, tiny_model: Any, tmp_path: Path, tuning: str
) -> None:
    base = tiny_model("phi")
    job = make_job("phi", tuning=TUNINGS[tuning], train={"max_steps": 3}, evaluate=EVALUATE)
    result = job.work()
    assert result.state is RunState.SUCCEEDED, result.error
    directory = job.fetched(result.adapter, tmp_path / "out")
    ids = torch.arange(4, 44)
    theirs: Any = AutoModelForCausalLM.from_pretrained(base if tuning == "lora" else directory, dtype=torch.float32)
    if tuning == "lora":
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(theirs, str(directory))
        ours = logits_of_ours(base, ids, directory)
    else:
        ours = logits_of_ours(directory, ids)
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs.eval()(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_a_model_without_linears_is_refused(make_job: Make) -> None:
    result = make_job("gpt2").work()
    assert result.state is RunState.FAILED
    assert result.error["code"] == ModelError.code
    assert "no nn.Linear" in result.error["message"]
    assert "Llama" in result.error["hint"]


@pytest.mark.parametrize(
    ("tuning", "message", "hint"),
    [
        ({"type": "lora", "targets": ["q_projection"]}, "q_projection", "q_proj"),
        ({"type": "lora", "rank": 65}, "65", "at most 64"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    make_job: Make, tuning: dict[str, Any], message: str, hint: str
) -> None:
    result = make_job(tuning=tuning).work()
    assert result.error["code"] == ModelError.code
    assert message in result.error["message"]
    assert hint in result.error["hint"]


def test_an_adapter_that_learned_nothing_is_not_published(make_job: Make) -> None:
    job = make_job(train={"learning_rate": 1e-30, "max_steps": 2})
    result = job.work()
    assert result.state is RunState.FAILED
    assert "change nothing" in result.error["message"]
    assert job.store.children("adapters") == []


def test_it_works_on_s3(make_job: Make, s3: str, tmp_path: Path) -> None:
    """Spec, data, checkpoints and adapter in a bucket give the digest that a directory gives."""
    expected = make_job(name="local").work().adapter
    job = make_job(name="remote", store=s3)
    assert job.work().adapter == expected
    directory = job.fetched(expected, tmp_path / "adapter")
    assert json.loads((directory / "adapter_config.json").read_text())["r"] == 8
    assert all(torch.isfinite(value).all() for value in load_file(directory / "adapter_model.safetensors").values())
    assert len(Store(s3).children(checkpoints_path(job.resolved.run))) >= 2
