"""The loop: labels, loss, packing, and what happens when a step fails. fp32 throughout. 6 seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from jobs.train import loop
from jobs.train.batches import Batches
from jobs.train.engines import SingleEngine
from jobs.train.loop import SLOT, Hooks, train
from jobs.train.packing import pack
from jobs.train.steps import Progress
from orchestrator.errors import OutOfMemory, TrainingDiverged
from orchestrator.modeling.decoder import adapter_parameters, add_adapter
from orchestrator.modeling.loading import load_model
from orchestrator.modeling.lora import LoraShape
from orchestrator.spec.job import TrainSpec

LENGTHS = [12, 30, 7, 25, 18, 40, 2, 9, 33, 21]
SPEC = TrainSpec(dtype="float32", learning_rate=1e-2, batch_size=4, epochs=2)
Made = Callable[..., Any]


def model_of(
    directory: Path, dropout: float = 0.0, plain: bool = False, device: str = "cpu"
) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    model = load_model(directory, dtype=torch.float32, plain=plain, device=device)
    add_adapter(model, SLOT, LoraShape(4, 8.0, dropout), seed=0)
    parameters = adapter_parameters(model, SLOT)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return model, parameters


def trained(directory: Path, rows: Any, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps and the weights at the end."""
    dropout, plain, device = options.pop("dropout", 0.0), options.pop("plain", False), options.pop("device", "cpu")
    model, parameters = model_of(directory, dropout, plain, device)
    batches = Batches(rows.lengths, **{"batch_size": 4, "epochs": 2, "seed": 0} | options)
    losses: list[float] = []
    train(
        model,
        SingleEngine(parameters, SPEC),
        rows,
        batches,
        lambda step: 1e-2,
        seed=0,
        progress=Progress(0, batches.total_steps),
        hooks=Hooks(on_step=lambda progress: losses.append(progress.loss)),
        device=device,
    )
    return losses, {name: p.detach().cpu().clone() for name, p in parameters.items()}


# --- what is learned ------------------------------------------------------------------------------------------------


def test_labels_are_the_next_token_of_the_same_document(make_rows: Made) -> None:
    rows = make_rows([5, 1, 9, 4])
    chosen = [2, 0, 1, 3]
    batch = pack(rows, chosen, labelled=10)
    start = 0
    expected: dict[int, int] = {}
    for row in chosen:
        ids, mask = rows[row].ids, rows[row].loss_mask
        expected |= {start + i - 1: int(ids[i]) for i in range(1, len(ids)) if mask[i]}
        start += len(ids)
    assert dict(zip(batch.at.tolist(), batch.labels.tolist(), strict=True)) == expected
    assert list(batch.documents.lengths) == [9, 5, 1, 4]
    assert batch.real_tokens == len(batch.ids) == 19
    assert batch.token_weights.tolist() == pytest.approx([0.1] * len(expected))
    assert len(batch.at) == rows.labelled[chosen].sum()


def test_an_empty_micro_batch_weighs_nothing(make_rows: Made) -> None:
    batch = pack(make_rows([5, 4]), [], labelled=10)
    assert batch.real_tokens == 0
    assert not batch.token_weights.any()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_the_loss_is_transformers_own(tiny_model: Callable[[str], Path], make_rows: Made, architecture: str) -> None:
    """Mean over all labelled tokens of a step, however they are cut into micro-batches; 1e-5."""
    rows = make_rows(LENGTHS)
    directory = tiny_model(architecture)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    batches = Batches(rows.lengths, batch_size=len(LENGTHS), epochs=1, seed=0, micro_batch_tokens=60)
    total = 0.0
    with torch.no_grad():
        for row in rows.rows:
            logits = theirs(torch.from_numpy(row.ids).long()[None]).logits[0, :-1]
            labels = torch.from_numpy(row.ids).long().masked_fill(~torch.from_numpy(row.loss_mask), -100)[1:]
            total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
    model, parameters = model_of(directory)
    seen: list[float] = []
    train(
        model, SingleEngine(parameters, SPEC), rows, batches, lambda step: 1e-3, seed=0, progress=Progress(0, 1),
        hooks=Hooks(on_step=lambda progress: seen.append(progress.loss)),
    )  # fmt: skip
    expected = total / rows.labelled.sum()
    assert seen[0] == pytest.approx(expected, abs=1e-5)
    untrained, _ = model_of(directory)
    assert loop.mean_loss(untrained, rows, batches) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "other", [{"packing": False}, {"micro_batch_tokens": 40}, {"uniform": True, "micro_batch_tokens": 50}]
)
def test_how_rows_are_packed_changes_no_result(
    tiny_model: Callable[[str], Path], make_rows: Made, architecture: str, other: dict[str, Any]
) -> None:
    """Losses within 1e-5, weights after five steps of Adam within 5e-4 of one large packed batch.

    Adam divides a gradient by its own size, so where one is nearly zero a rounding becomes a visible part of a step.
    """
    rows, directory = make_rows(LENGTHS), tiny_model(architecture)
    losses, weights = trained(directory, rows)
    other_losses, other_weights = trained(directory, rows, **other)
    assert other_losses == pytest.approx(losses, abs=1e-5)
    for name in weights:
        torch.testing.assert_close(other_weights[name], weights[name], atol=5e-4, rtol=0)


def test_the_plain_path_trains_as_the_fused_one(tiny_model: Callable[[str], Path], make_rows: Made) -> None:
    rows, directory = make_rows(LENGTHS), tiny_model("llama")
    fused, _ = trained(directory, rows)
    plain, _ = trained(directory, rows, plain=True, packing=False)
    assert plain == pytest.approx(fused, abs=1e-4)


def test_the_same_run_twice_is_the_same_to_the_last_bit(tiny_model: Callable[[str], Path], make_rows: Made) -> None:
    rows, directory = make_rows(LENGTHS), tiny_model("llama")
    one, two = (trained(directory, rows, dropout=0.2) for _ in range(2))
    assert one[0] == two[0]
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])
    assert one[0] != trained(directory, rows)[0]  # dropout did something


def test_progress_counts_tokens_and_epochs(tiny_model: Callable[[str], Path], make_rows: Made) -> None:
    rows = make_rows(LENGTHS)
    model, parameters = model_of(tiny_model("llama"))
    batches = Batches(rows.lengths, batch_size=4, epochs=2, seed=0)
    progress = Progress(0, batches.total_steps)
    calls: list[str] = []
    train(
        model, SingleEngine(parameters, SPEC), rows, batches, lambda step: 1e-3, seed=0, progress=progress,
        hooks=Hooks(
            validate=lambda p: calls.append(f"v{p.step}"),
            checkpoint=lambda p: calls.append(f"c{p.step}"),
            validate_every=2,
            checkpoint_every=3,
        ),
    )  # fmt: skip
    assert (progress.step, progress.tokens, progress.epoch) == (5, 2 * sum(LENGTHS), 2.0)
    assert calls == ["v2", "c3", "v4", "v5", "c5"]


def test_validation_may_be_due_besides(tiny_model: Callable[[str], Path], make_rows: Made) -> None:
    rows, calls = make_rows(LENGTHS), []
    model, parameters = model_of(tiny_model("llama"))
    batches = Batches(rows.lengths, batch_size=4, epochs=2, seed=0)
    train(
        model, SingleEngine(parameters, SPEC), rows, batches,
        lambda step: 1e-3, seed=0, progress=Progress(0, batches.total_steps),
        hooks=Hooks(validate=lambda p: calls.append(p.step), validate_every=2, validate_after=lambda step: step == 3),
    )  # fmt: skip
    assert calls == [2, 3, 4, 5]


@pytest.mark.parametrize(("wish", "saved"), [("pause", [2]), ("cancel", [])])
def test_a_wish_ends_the_loop_after_the_step_in_hand(
    tiny_model: Callable[[str], Path], make_rows: Made, wish: str, saved: list[int]
) -> None:
    rows = make_rows(LENGTHS)
    model, parameters = model_of(tiny_model("llama"))
    progress, checkpoints = Progress(0, 5), []
    stop = train(
        model, SingleEngine(parameters, SPEC), rows, Batches(rows.lengths, batch_size=4, epochs=2, seed=0),
        lambda step: 1e-3, seed=0, progress=progress,
        hooks=Hooks(
            asked_to_stop=lambda: wish if progress.step == 2 else None,
            checkpoint=lambda p: checkpoints.append(p.step),
        ),
    )  # fmt: skip
    assert (stop, progress.step, checkpoints) == (wish, 2, saved)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def run_with(model: Any, parameters: Any, rows: Any, hooks: Hooks) -> None:
    batches = Batches(rows.lengths, batch_size=4, epochs=2, seed=0)
    train(model, SingleEngine(parameters, SPEC), rows, batches, lambda step: 2e-3, seed=0,
          progress=Progress(0, batches.total_steps), hooks=hooks)  # fmt: skip


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_names_step_and_rate_and_leaves_the_last_good_checkpoint(
    tiny_model: Callable[[str], Path], make_rows: Made, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    rows = make_rows(LENGTHS)
    model, parameters = model_of(tiny_model("llama"))
    saved: list[tuple[int, dict[str, torch.Tensor]]] = []
    calculate = model.loss

    def breaks_in_the_third_step(*arguments: Any) -> Any:
        loss, losses = calculate(*arguments)
        if len(saved) == 2:
            if where == "loss":
                loss = loss * math.nan
            else:
                loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, losses

    monkeypatch.setattr(model, "loss", breaks_in_the_third_step)

    def checkpoint(progress: Progress) -> None:
        saved.append((progress.step, {name: p.detach().clone() for name, p in parameters.items()}))

    with pytest.raises(TrainingDiverged, match=r"step 3: .*learning rate 0\.002") as caught:
        run_with(model, parameters, rows, Hooks(checkpoint=checkpoint, checkpoint_every=1))
    assert where in str(caught.value)
    assert "earlier steps are kept" in str(caught.value.hint)
    assert [step for step, _ in saved] == [1, 2]
    assert all(torch.equal(parameters[name], value) for name, value in saved[-1][1].items())


@pytest.mark.parametrize("learning_rate", [1e10, 1e30])
def test_a_rate_that_throws_the_weights_away_is_divergence(
    tiny_model: Callable[[str], Path], make_rows: Made, learning_rate: float
) -> None:
    """Without clipping and in finite numbers: the loss is that of uniform logits, and no gradient leads away from them."""
    rows = make_rows(LENGTHS)
    model, parameters = model_of(tiny_model("llama"))
    progress = Progress(0, 5)
    with pytest.raises(TrainingDiverged, match=r"at step [23]: .* at learning rate 1e\+[13]0") as caught:
        train(
            model, SingleEngine(parameters, SPEC.model_copy(update={"max_grad_norm": None})), rows,
            Batches(rows.lengths, batch_size=4, epochs=2, seed=0), lambda step: learning_rate, seed=0, progress=progress,
            hooks=Hooks(),
        )  # fmt: skip
    assert caught.value.context["step"] in (2, 3)


@pytest.mark.parametrize(("factor", "said"), [(0.0, "gradient norm 0.0 with loss 6"), (60.0, r"step 3: loss \d{3}")])
def test_loss_without_gradient_or_beyond_reason_is_divergence(
    tiny_model: Callable[[str], Path], make_rows: Made, monkeypatch: pytest.MonkeyPatch, factor: float, said: str
) -> None:
    rows = make_rows(LENGTHS)
    model, parameters = model_of(tiny_model("llama"))
    calculate, seen = model.loss, []

    def breaks_in_the_third_step(*arguments: Any) -> Any:
        loss, losses = calculate(*arguments)
        if len(seen) == 2:
            loss = loss * factor if factor else loss.detach() + 0 * loss
        return loss, losses

    monkeypatch.setattr(model, "loss", breaks_in_the_third_step)
    with pytest.raises(TrainingDiverged, match=said):
        run_with(model, parameters, rows, Hooks(on_step=seen.append))


def test_rows_that_are_learnt_to_the_last_bit_are_no_divergence(
    tiny_model: Callable[[str], Path], make_rows: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(LENGTHS)
    model, parameters = model_of(tiny_model("llama"))
    calculate, seen = model.loss, []
    monkeypatch.setattr(model, "loss", lambda *a: tuple(0 * value for value in calculate(*a)))
    run_with(model, parameters, rows, Hooks(on_step=lambda progress: seen.append(progress.grad_norm)))
    assert seen == [0.0] * 5


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_out_of_memory_says_what_to_lower_with_numbers(
    tiny_model: Callable[[str], Path], make_rows: Made, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    rows = make_rows([40, 40, 40, 40])
    model, parameters = model_of(tiny_model("llama"))

    def does_not_fit(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(model, "loss", does_not_fit)
    with pytest.raises(OutOfMemory, match=r"160 tokens \(longest row 40\)") as caught:
        run_with(model, parameters, rows, Hooks())
    assert "train.micro_batch_tokens to 80" in str(caught.value.hint)
    assert caught.value.to_dict()


def test_another_runtime_error_stays_what_it_is(
    tiny_model: Callable[[str], Path], make_rows: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, parameters = model_of(tiny_model("llama"))

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(model, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_with(model, parameters, make_rows([40, 40, 40, 40]), Hooks())


def test_rows_that_begin_alike_compute_their_beginning_once(tiny_model: Callable[[str], Path], make_rows: Made) -> None:
    """Losses within 1e-5 of each row with its own copy; the beginning ends before the first token that predicts a target."""
    lengths = [12, 30, 8, 25, 18]
    rows, directory = make_rows(lengths), tiny_model("llama")
    for row in rows.rows:
        row.ids[:3] = [7, 8, 9]
        row.loss_mask[:5] = False
    whole, once = (loop.pack(rows, range(len(rows)), 1, share=share) for share in (False, True))
    assert whole.documents.shared == 0
    assert 3 <= once.documents.shared <= 4
    assert len(once.ids) == len(whole.ids) - once.documents.shared * (len(rows) - 1)
    assert once.real_tokens == whole.real_tokens == sum(lengths)
    assert once.labels.tolist() == whole.labels.tolist()
    model, _ = model_of(directory)
    losses = [loop.forward(model, batch, loop.SLOT)[1] for batch in (whole, once)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
