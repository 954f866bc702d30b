"""The engine of one worker is torch's AdamW with fp32 masters, and its state is the whole of it. 2 seconds."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor, nn

from jobs.train.engines import SingleEngine, State
from orchestrator.spec.job import TrainSpec

TRAIN = TrainSpec(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, dtype="float32")


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": nn.Parameter(torch.randn(6, 5, generator=generator).to(dtype)),
        "b": nn.Parameter(torch.randn(5, generator=generator).to(dtype)),
    }


def loss(held: dict[str, nn.Parameter], step: int, part: slice = slice(None)) -> Tensor:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))[part].to(held["a"].dtype)
    return (x @ held["a"] + held["b"]).square().sum() / 12


def stepped(held: dict[str, nn.Parameter], engine: SingleEngine, steps: range) -> list[float]:
    norms = []
    for step in steps:
        engine.backward(loss(held, step))
        norms.append(engine.step(1e-2 / (step + 1)))
    return norms


def same(one: State, two: State) -> bool:
    return all(torch.equal(one[kind][name], two[kind][name]) for kind in one for name in one[kind])


def test_it_is_adamw_with_clipping() -> None:
    ours, theirs = parameters(), parameters()
    norms = stepped(ours, SingleEngine(ours, TRAIN), range(5))
    adamw = torch.optim.AdamW(list(theirs.values()), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        adamw.param_groups[0]["lr"] = 1e-2 / (step + 1)
        adamw.zero_grad()
        loss(theirs, step).backward()
        norm = nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        assert norms[step] == pytest.approx(norm.item(), rel=1e-6)
        assert norm > 0.5  # or the test would not see clipping
        adamw.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulating_parts_is_one_large_batch(dtype: torch.dtype) -> None:
    whole, parts = parameters(dtype), parameters(dtype)
    one, many = SingleEngine(whole, TRAIN), SingleEngine(parts, TRAIN)
    for step in range(3):
        one.backward(loss(whole, step))
        for start in (0, 4, 8):
            many.backward(loss(parts, step, slice(start, start + 4)))
        assert one.step(1e-2) == pytest.approx(many.step(1e-2), rel=1e-5 if dtype is torch.float32 else 2e-2)
    for name in whole:
        tolerance = 1e-6 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(whole[name], parts[name], atol=tolerance, rtol=tolerance)


def test_steps_below_bfloat16s_resolution_are_not_lost() -> None:
    """A bf16 number near 1 has steps of 1/128; fp32 masters add up what is smaller."""
    held = {"w": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    engine = SingleEngine(held, TrainSpec(max_grad_norm=None))
    for _ in range(20):
        engine.backward(held["w"].sum())
        engine.step(1e-3)
    state = engine.state()
    assert state is not None
    torch.testing.assert_close(state["weights"]["w"], torch.full((4,), 0.98), atol=1e-4, rtol=0)
    assert torch.equal(held["w"], state["weights"]["w"].bfloat16())
    assert held["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("done", [0, 3])
def test_loading_a_state_goes_on_to_the_last_bit(dtype: torch.dtype, done: int) -> None:
    undisturbed = parameters(dtype)
    engine = SingleEngine(undisturbed, TRAIN)
    stepped(undisturbed, engine, range(done))
    halfway = engine.state()
    stepped(undisturbed, engine, range(done, 6))
    resumed = {name: nn.Parameter(torch.zeros_like(p)) for name, p in parameters(dtype).items()}
    other = SingleEngine(resumed, TRAIN)
    assert halfway is not None
    other.load(halfway, done)
    stepped(resumed, other, range(done, 6))
    one, two = engine.state(), other.state()
    assert one is not None
    assert two is not None
    assert same(one, two)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_steady_one_keeps_its_memory_and_gives_the_same_bits(dtype: torch.dtype) -> None:
    held, steady = parameters(dtype), parameters(dtype)
    engine, other = SingleEngine(held, TRAIN), SingleEngine(steady, TRAIN, steady=True)
    places = [gradient.data_ptr() for gradient in other.gradients()]
    moments = [moment.exp_avg.data_ptr() for moment in other._moments.values()]
    norms = []
    for step in range(4):
        for start in (0, 6):
            for one, its in ((engine, held), (other, steady)):
                one.backward(loss(its, step, slice(start, start + 6)) * (float("nan") if step == 1 else 1))
        assert [gradient.data_ptr() for gradient in other.gradients()] == places
        norms.append((engine.step(1e-2), other.step(1e-2)))
    assert [moment.exp_avg.data_ptr() for moment in other._moments.values()] == moments
    assert [a for a, _ in norms] == pytest.approx([b for _, b in norms], abs=0, nan_ok=True)
    one, two = engine.state(), other.state()
    assert one is not None
    assert two is not None
    assert same(one, two)


def test_a_state_is_a_copy() -> None:
    held = parameters()
    engine = SingleEngine(held, TRAIN)
    stepped(held, engine, range(1))
    state = engine.state()
    assert state is not None
    before = {kind: {name: value.clone() for name, value in values.items()} for kind, values in state.items()}
    stepped(held, engine, range(1, 3))
    assert same(state, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    held = parameters()
    engine = SingleEngine(held, TRAIN)
    stepped(held, engine, range(2))
    before = engine.state()
    engine.backward(loss(held, 2) * bad)
    assert not torch.isfinite(torch.tensor(engine.step(1e-2)))
    after = engine.state()
    assert before is not None
    assert after is not None
    assert same(before, after)


def test_no_compiler_is_imported_to_take_a_step() -> None:
    """It would take seconds of each run's start."""
    code = """
        import sys, torch
        from jobs.train.engines import SingleEngine
        from orchestrator.spec.job import TrainSpec
        weight = torch.nn.Parameter(torch.ones(3))
        engine = SingleEngine({"a": weight}, TrainSpec())
        engine.backward(weight.square().sum())
        engine.step(1e-3)
        engine.load(engine.state(), 1)
        print(weight[0].item() < 1, "torch._dynamo" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False"], done.stderr
