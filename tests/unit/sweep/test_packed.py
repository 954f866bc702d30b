"""A packed trial is its own run: step by step, whatever trains beside it, comes, goes, breaks or is killed. 25 seconds."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.sweep import snapshots
from jobs.sweep.packed import PackedGroup
from jobs.sweep.reports import Compute
from jobs.train.artifact import load_adapter
from jobs.train.setup import Place
from orchestrator.errors import ModelError, NoFreeLane, OutOfMemory, TrainingDiverged, TrialRunsAlone
from orchestrator.modeling.decoder import adapter_tensors
from orchestrator.modeling.dtypes import DTYPES
from orchestrator.modeling.loading import load_model
from orchestrator.modeling.lora import FusedLinear
from tests.unit.sweep.conftest import (
    MIXED,
    PER_EPOCH,
    TRUNK,
    Course,
    Models,
    alone,
    broken_lane,
    check_close,
    follow,
    group_of,
    made_spec,
    packed,
    same,
    trunk,
)


def forward_passes(group: PackedGroup, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with how many adapters each forward pass has."""
    seen: list[int] = []
    calculate = group._network.loss

    def loss(*arguments: Any) -> Any:
        seen.append(len(arguments[5]))
        return calculate(*arguments)

    monkeypatch.setattr(group._network, "loss", loss)
    return seen


# --- a trial is its own run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2"])
def test_trials_side_by_side_are_each_their_own_run(
    tiny_model: Models,
    rows: Any,
    validation_rows: Any,
    monkeypatch: pytest.MonkeyPatch,
    place: Place,
    architecture: str,
) -> None:
    """Losses and weights within 1e-5 at each step, in fp32, of nine trials in joint passes."""
    directory = tiny_model(architecture)
    group = group_of(directory, rows, validation_rows, place=place)
    passes = forward_passes(group, monkeypatch)
    found = packed(group, MIXED)
    assert max(passes) > 4
    for trial, spec in MIXED.items():
        check_close(found[trial], alone(directory, rows, validation_rows, spec, place))


def test_rows_that_begin_alike_compute_their_beginning_once_for_each_lane(
    tiny_model: Models, alike_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama")
    group = group_of(directory, alike_rows)
    tokens: list[int] = []
    calculate = group._network.loss
    monkeypatch.setattr(group._network, "loss", lambda *a: (tokens.append(len(a[0])), calculate(*a))[1])
    specs = {name: MIXED[name] for name in ("plain", "seed", "rank")}
    found = packed(group, specs)
    for trial, spec in specs.items():
        check_close(found[trial], alone(directory, alike_rows, None, spec))
    assert sum(tokens) <= group.computed.tokens - 4 * 3 * 3 * 2 * PER_EPOCH  # 3 of 4 rows, of 3 trials, in each step


def test_trials_that_differ_in_what_trains_them_share_their_first_gradient(
    tiny_model: Models, rows: Any, validation_rows: Any, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    """To the last bit: learning rate, clipping and AdamW come after it."""
    directory, cut = tiny_model("llama"), {"train__micro_batch_tokens": 200}
    specs = {f"rate{n}": made_spec(train__learning_rate=1e-3 * (n + 1), **cut) for n in range(3)}
    specs["adam"] = made_spec(train__weight_decay=0.1, train__betas=[0.8, 0.99], train__max_grad_norm=None, **cut)
    specs["dropout"] = made_spec(tuning__dropout=0.3, **cut)
    specs["seed"] = made_spec(train__seed=7, **cut)
    group = group_of(directory, rows, validation_rows, tokens_at_once=8, place=place)
    passes = forward_passes(group, monkeypatch)
    for trial, spec in specs.items():
        group.open(trial, spec)
    found = follow(group, {}, steps=1)
    assert len(passes) == group.computed.steps == 3, "one for four trials, and two that begin otherwise"
    follow(group, found)
    for trial, spec in specs.items():
        assert same(found[trial], alone(directory, rows, validation_rows, spec, place)), trial
    assert group.computed.steps == group.alone.steps - 3


def test_a_trial_that_comes_later_begins_by_itself(tiny_model: Models, rows: Any) -> None:
    directory, cut = tiny_model("llama"), {"train__micro_batch_tokens": 200}
    group = group_of(directory, rows, tokens_at_once=8)
    group.open("first", made_spec(**cut))
    found = follow(group, {}, steps=1)
    group.open("later", made_spec(train__learning_rate=2e-3, **cut))
    follow(group, found)
    assert same(found["later"], alone(directory, rows, None, made_spec(train__learning_rate=2e-3, **cut)))
    assert group.computed == group.alone


@pytest.mark.parametrize("kind", ["rows", "alike_rows"])
def test_what_goes_alone_is_its_own_run_to_the_last_bit(
    tiny_model: Models, request: pytest.FixtureRequest, validation_rows: Any, place: Place, kind: str
) -> None:
    """No two micro-batches fit together; recomputed layers and dropout among the trials."""
    rows, directory = request.getfixturevalue(kind), tiny_model("llama")
    cut = {"train__micro_batch_tokens": 60}
    specs = {
        name: spec.model_copy(update={"train": spec.train.model_copy(update={"micro_batch_tokens": 60})})
        for name, spec in MIXED.items()
    } | {"recomputed": made_spec(tuning__dropout=0.2, train__gradient_checkpointing=True, **cut)}
    found = packed(group_of(directory, rows, validation_rows, tokens_at_once=8, place=place), specs)
    for trial, spec in specs.items():
        expected = alone(directory, rows, validation_rows, spec, place)
        assert same(found[trial], expected), trial
        assert found[trial].validation.items() <= expected.validation.items()


def test_layers_are_recomputed_while_a_trial_asks_for_it(tiny_model: Models, rows: Any, tmp_path: Path) -> None:
    group = group_of(tiny_model("llama"), rows)
    group.open("a", made_spec())
    group.open("b", made_spec(train__gradient_checkpointing=True, train__seed=1))
    group.step()
    assert group._network.gradient_checkpointing
    snapshots.write(tmp_path, group.snapshot())
    group.close("b")
    group.step()
    assert not group._network.gradient_checkpointing
    again = group_of(tiny_model("llama"), rows)
    again.restore(tmp_path)
    again.step()
    assert again._network.gradient_checkpointing


def test_bfloat16_stays_within_its_own_rounding(tiny_model: Models, rows: Any, place: Place) -> None:
    """Losses within 0.02 of nearly 6, weights within 2e-3 after six steps at a learning rate of 2e-3."""
    directory, specs = tiny_model("llama"), {}
    for name in ("plain", "rank", "batch", "seed"):
        train = MIXED[name].train.model_copy(update={"dtype": "bfloat16", "learning_rate": 2e-3})
        specs[name] = MIXED[name].model_copy(update={"train": train})
    found = packed(group_of(directory, rows, dtype=torch.bfloat16, place=place), specs)
    for trial, spec in specs.items():
        check_close(found[trial], alone(directory, rows, None, spec, place), loss=0.02, weight=2e-3)


def test_validation_is_at_the_end_of_each_epoch_and_at_the_end(
    tiny_model: Models, rows: Any, validation_rows: Any
) -> None:
    directory = tiny_model("llama")
    spec = made_spec(train__epochs=2.5)
    found = packed(group_of(directory, rows, validation_rows), {"a": spec, "b": made_spec(train__seed=1)})
    assert list(found["a"].validation) == [PER_EPOCH, 2 * PER_EPOCH, 8]
    assert list(found["b"].validation) == [PER_EPOCH, 2 * PER_EPOCH]
    check_close(found["a"], alone(directory, rows, validation_rows, spec))


# --- trunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [3, 2, 1])
def test_a_trunks_branch_is_its_own_run(
    tiny_model: Models, rows: Any, validation_rows: Any, place: Place, lanes: int
) -> None:
    """To the last bit, with a lane for each branch and with fewer: then those that end later wait."""
    directory = tiny_model("llama")
    specs = {
        name: spec.model_copy(update={"train": spec.train.model_copy(update={"micro_batch_tokens": 64})})
        for name, spec in TRUNK.items()
    }
    group = group_of(directory, rows, validation_rows, tokens_at_once=8, lanes=lanes, place=place)
    found = packed(group, specs)
    for trial, spec in specs.items():
        assert same(found[trial], alone(directory, rows, validation_rows, spec, place))
    assert (group.computed.steps, group.alone.steps) == (1 + 2 + 2 + 3 + 6, 3 + 6 + 9)
    assert group.computed.tokens < 0.85 * group.alone.tokens


def test_riders_of_one_lane_are_told_each_what_is_theirs(tiny_model: Models, rows: Any, validation_rows: Any) -> None:
    """At a constant rate, a shorter trial is a longer one's beginning: it finishes on the lane, which goes on."""
    directory = tiny_model("llama")
    specs = {f"e{epochs}": made_spec(train__schedule="constant", train__epochs=epochs) for epochs in (3, 1, 2)}
    group = group_of(directory, rows, validation_rows, lanes=1)
    found = packed(group, specs)
    assert (group.computed.steps, group.alone.steps) == (3 * PER_EPOCH, 6 * PER_EPOCH)
    for trial, spec in specs.items():
        check_close(found[trial], alone(directory, rows, validation_rows, spec))
        last = found[trial].last
        assert last is not None
        assert (last.state, last.step, last.total_steps, last.epoch) == (
            "finished",
            len(found[trial]),
            len(found[trial]),
            spec.train.epochs,
        )
    assert torch.equal(found["e1"].weights[-1]["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"],
                       group.adapter("e1")["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"])  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [
        {"train__learning_rate": 9e-3}, {"train__seed": 1}, {"train__batch_size": 3}, {"train__max_grad_norm": 0.5},
        {"train__weight_decay": 0.1}, {"train__betas": [0.9, 0.99]}, {"train__eps": 1e-4}, {"tuning__rank": 4},
        {"tuning__alpha": 8.0}, {"tuning__dropout": 0.1}, {"tuning__rslora": True}, {"tuning__targets": ["q_proj"]},
        {"train__micro_batch_tokens": 64},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_trials_that_differ_have_a_lane_each(tiny_model: Models, rows: Any, other: dict[str, Any]) -> None:
    group = group_of(tiny_model("llama"), rows, lanes=2)
    group.open("a", made_spec())
    group.open("b", made_spec(train__schedule="constant"))  # another first step: cosine falls within it
    assert group.free == 0
    group.close("b")
    group.open("c", made_spec(**other))
    assert group.free == 0


def test_one_that_comes_late_rides_a_lane_that_came_its_way(tiny_model: Models, rows: Any) -> None:
    directory = tiny_model("llama")
    group = group_of(directory, rows, lanes=4)
    group.open("a", trunk(3))
    group.step()
    group.open("late", trunk(2))
    group.open("other", trunk(2, train__seed=9))
    assert (group.free, group.steps) == (2, {"a": 1, "late": 1, "other": 0})
    assert (group.company("late"), group.company("other")) == (["a"], [])
    expected = alone(directory, rows, None, TRUNK["e2"])
    assert (group.computed.steps, group.alone.steps) == (1, 2)
    assert group.alone.tokens == 2 * expected.tokens[0]
    assert group.total_steps("late") == len(expected)
    follow(group, {"a": Course(losses=[0.0]), "late": Course(losses=[0.0])})
    assert group.alone.steps == len(expected) * 2 + group.steps["a"]
    for name, weight in group.adapter("late").items():
        torch.testing.assert_close(weight, expected.weights[-1][name], atol=1e-5, rtol=0, msg=name)


def test_one_that_would_have_parted_already_begins_anew(tiny_model: Models, rows: Any) -> None:
    group = group_of(tiny_model("llama"), rows, lanes=2)
    short = len(alone(tiny_model("llama"), rows, None, TRUNK["e1"]))
    group.open("a", trunk(3))
    for _ in range(short):
        group.step()
    group.open("past its end", trunk(1))
    assert (group.free, group.steps) == (0, {"a": short, "past its end": 0})


# --- trials come and go ---------------------------------------------------------------------------------------------


def test_those_that_part_at_one_step_go_on_at_one_step(tiny_model: Models, rows: Any) -> None:
    """Three trunks in four lanes part from their shortest trials after a step; one of them would find a lane at once, and come to the
    end of its epoch before the two others. They are their own runs all the same."""
    directory = tiny_model("llama")
    rates = (1e-2, 5e-3, 2e-3)
    specs = {f"e{n}-{rate}": trunk(n, train__learning_rate=rate) for rate in rates for n in (1, 2)}
    group = group_of(directory, rows, lanes=4)
    for trial, spec in specs.items():
        group.open(trial, spec)
    found: dict[str, Course] = {}
    long = [f"e2-{rate}" for rate in rates]
    for _ in range(8):
        follow(group, found, steps=1)
        assert len({group.steps[trial] for trial in long}) == 1
    assert [len(found[trial]) for trial in specs] == [PER_EPOCH, 2 * PER_EPOCH] * 3
    check_close(found[long[1]], alone(directory, rows, None, specs[long[1]]))


def test_those_that_part_wait_for_nobody_once_those_who_stayed_are_gone(tiny_model: Models, rows: Any) -> None:
    """A lane that was theirs is another trial's by then: there will not be room for both, so one goes on."""
    group = group_of(tiny_model("llama"), rows, lanes=2)
    for trial, spec in {f"e{n}-{rate}": trunk(n, train__learning_rate=rate) for rate in (1, 2) for n in (1, 2)}.items():
        group.open(trial, spec)
    group.step()
    group.step()
    group.close("e1-1")
    assert group.free == 1, "one who stayed is still there"
    group.open("other", made_spec(train__epochs=4))
    group.step()
    assert [group.steps[trial] for trial in ("e1-2", "e2-1", "e2-2")] == [3, 1, 1]
    group.step()
    assert [group.steps[trial] for trial in ("e2-1", "e2-2")] == [2, 1]


def test_whose_way_a_trial_would_come_is_known_of_those_that_are_over(tiny_model: Models, rows: Any) -> None:
    group = group_of(tiny_model("llama"), rows)
    group.open("e3", trunk(3))
    group.open("e1", trunk(1))
    assert group.forerunner("e2", trunk(2)) is None, "it can go with e3"
    for _ in range(4):
        group.step()
    assert group.finished == ["e1"]
    assert group.forerunner("e2", trunk(2)) == ("e1", 1, 6), "e3 is beyond where they part, and not over"
    group.close("e3")
    assert group.forerunner("e2", trunk(2)) == ("e3", 3, 6)
    assert group.forerunner("long", trunk(4)) == ("e3", 4, 12)
    assert group.forerunner("other", trunk(2, train__learning_rate=1e-3)) is None
    assert group.forerunner("full", made_spec(tuning__type="full")) is None


def test_a_lane_that_is_freed_in_the_middle_takes_another_trial(tiny_model: Models, rows: Any) -> None:
    directory = tiny_model("llama")
    group = group_of(directory, rows, lanes=2)
    for trial in ("plain", "seed"):
        group.open(trial, MIXED[trial])
    found = follow(group, {}, steps=2)
    with pytest.raises(NoFreeLane, match="all 2 lanes"):
        group.open("rank", MIXED["rank"])
    group.close("seed")
    assert group.free == 1
    group.open("rank", MIXED["rank"])
    follow(group, found)
    assert len(found["seed"]) == 2
    for trial in ("plain", "rank"):
        check_close(found[trial], alone(directory, rows, None, MIXED[trial]))
    assert group.free == 2
    assert sorted(group.finished) == ["plain", "rank"]
    assert not any(linear.slots for linear in group._network.modules() if isinstance(linear, FusedLinear))


def test_closing_a_rider_leaves_the_lane_to_the_others(tiny_model: Models, rows: Any) -> None:
    directory = tiny_model("llama")
    group = group_of(directory, rows, lanes=1)
    for trial, spec in TRUNK.items():
        group.open(trial, spec)
    found = follow(group, {}, steps=2)
    assert group.steps == {"e1": 2, "e2": 1, "e3": 1}
    group.close("e3")  # waits, together with another
    group.close("e1")  # has the lane to itself
    group.close("unknown")
    follow(group, found)
    assert (len(found["e1"]), len(found["e3"])) == (2, 1)
    check_close(found["e2"], alone(directory, rows, None, TRUNK["e2"]))


def test_a_finished_trials_adapter_is_there_until_it_is_closed(tiny_model: Models, rows: Any, tmp_path: Path) -> None:
    directory = tiny_model("llama")
    group = group_of(directory, rows)
    found = packed(group, {name: MIXED[name] for name in ("targets", "plain")})
    group.write_adapter("targets", tmp_path / "adapter", "tiny")
    fresh = load_model(directory, dtype=torch.float32)
    load_adapter(fresh, "read", tmp_path / "adapter")
    read = adapter_tensors(fresh, "read")
    assert read.keys() == found["targets"].weights[-1].keys()
    assert all(torch.equal(read[name], value) for name, value in found["targets"].weights[-1].items())
    group.close("targets")
    assert group.finished == ["plain"]
    with pytest.raises(KeyError):
        group.adapter("targets")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tuning__type": "qlora"}, "tuning.type qlora"),
        ({"tuning__type": "full"}, "tuning.type full"),
        ({"train__packing": False}, "train.packing is false"),
        ({"train__dtype": "bfloat16"}, "train.dtype is bfloat16, and the base is there in float32"),
    ],
)
def test_what_cannot_share_is_refused_with_the_reason(
    tiny_model: Models, rows: Any, fields: dict[str, Any], reason: str
) -> None:
    group = group_of(tiny_model("llama"), rows)
    with pytest.raises(TrialRunsAlone, match=reason) as caught:
        group.open("t", made_spec(**fields))
    assert caught.value.context["trial"] == "t"
    assert group.step() == []


def test_the_plain_path_is_refused(tiny_model: Models, rows: Any) -> None:
    with pytest.raises(TrialRunsAlone, match="plain path"):
        group_of(tiny_model("phi"), rows).open("t", made_spec())


@pytest.mark.parametrize("fields", [{"tuning__targets": ["query"]}, {"tuning__rank": 4096}])
def test_an_adapter_that_does_not_fit_leaves_the_group_as_it_was(
    tiny_model: Models, rows: Any, fields: dict[str, Any]
) -> None:
    group = group_of(tiny_model("llama"), rows, lanes=1)
    with pytest.raises(ModelError):
        group.open("t", made_spec(**fields))
    assert (group.free, group.steps) == (1, {})
    group.open("t", made_spec())
    assert len(follow(group, {})["t"]) == 2 * PER_EPOCH


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "value", "dtype"),
    [
        *itertools.product(["llama", "gemma2"], [math.nan, math.inf, 1e30], ["float32"]),
        ("llama", math.nan, "bfloat16"),  # another attention, on a GPU
    ],
)
def test_a_trial_that_diverges_dies_alone(
    tiny_model: Models, alike_rows: Any, validation_rows: Any, place: Place, architecture: str, value: float, dtype: str
) -> None:
    """The others go on to the last bit as beside a sound trial that is closed after the same step."""
    names, results = ("plain", "bad", "rank", "dropout"), []
    for breaks in (False, True):
        group = group_of(tiny_model(architecture), alike_rows, validation_rows, place=place, dtype=DTYPES[dtype])
        for name in names:
            spec = MIXED.get(name) or made_spec(train__seed=3, train__learning_rate=7e-3)
            train = spec.train.model_copy(update={"dtype": dtype})
            group.open(name, spec.model_copy(update={"train": train}))
        found = follow(group, {}, steps=2)
        if breaks:
            broken_lane(group, "bad", value)
            follow(group, found, steps=1)
            assert "bad" not in group.steps
        else:
            follow(group, found, steps=1)
            group.close("bad")
        results.append(follow(group, found))
    sound, beside = results
    last = beside["bad"].last
    assert last is not None
    assert (last.state, last.step, len(beside["bad"])) == ("diverged", 2, 2)
    assert isinstance(last.error, TrainingDiverged)
    assert last.error.context["step"] == 3
    assert last.error.context["trial"] == "bad"
    assert last.error.context["learning_rate"] == pytest.approx(sound["bad"].rates[2])
    for name in ("plain", "rank", "dropout"):
        assert same(sound[name], beside[name])
        assert sound[name].validation == beside[name].validation
        assert len(beside[name]) == 2 * PER_EPOCH


def test_a_lane_that_diverges_ends_all_its_riders(tiny_model: Models, rows: Any) -> None:
    directory = tiny_model("llama")
    group = group_of(directory, rows)
    specs = {
        f"e{epochs}": made_spec(train__schedule="constant", train__epochs=epochs, train__seed=1) for epochs in (1, 2)
    }
    for trial, spec in (specs | {"plain": MIXED["plain"]}).items():
        group.open(trial, spec)
    found = follow(group, {}, steps=1)
    broken_lane(group, "e1", math.nan)
    follow(group, found)
    for trial in specs:
        last = found[trial].last
        assert last is not None
        assert last.error is not None
        assert (last.state, last.error.context["trial"], last.error.context["step"]) == ("diverged", trial, 2)
    assert group.free == 16
    assert group.finished == ["plain"]


def test_a_validation_loss_that_is_not_finite_is_divergence(
    tiny_model: Models, rows: Any, validation_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of(tiny_model("llama"), rows, validation_rows)
    calculate = group._network.loss

    def loss(*arguments: Any) -> Any:
        total, losses = calculate(*arguments)
        if not group._network.training and len(arguments[5]) == 2:
            losses = losses * torch.tensor([math.nan, 1.0]).repeat_interleave(torch.tensor([1, len(losses) - 1]))
        return total, losses

    monkeypatch.setattr(group._network, "loss", loss)
    found = packed(group, {"a": MIXED["plain"], "b": MIXED["seed"]})
    last = found["a"].last
    assert last is not None
    assert (last.state, last.step) == ("diverged", PER_EPOCH)
    assert "validation loss nan" in str(last.error)
    assert found["b"].last is not None
    assert found["b"].last.step == 2 * PER_EPOCH


def test_memory_that_runs_out_in_a_joint_pass_says_what_to_lower(
    tiny_model: Models, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of(tiny_model("llama"), rows)
    for name in ("plain", "seed"):
        group.open(name, MIXED[name])

    def does_not_fit(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(group._network, "loss", does_not_fit)
    with pytest.raises(OutOfMemory, match=r"sweep\.max_concurrent"):
        group.step()


# --- what is said ---------------------------------------------------------------------------------------------------


def test_compute_is_counted_once_a_lane_and_once_a_trial(tiny_model: Models, rows: Any) -> None:
    group = group_of(tiny_model("llama"), rows)
    group.open("a", made_spec(train__schedule="constant", train__epochs=1))
    group.open("b", made_spec(train__schedule="constant", train__epochs=2))
    group.open("c", made_spec(train__seed=5, train__epochs=1))
    for _ in itertools.takewhile(bool, (group.step() for _ in itertools.count())):
        pass
    epoch = int(sum(rows.lengths))
    assert group.computed == Compute(3 * PER_EPOCH, 3 * epoch)
    assert group.alone == Compute(4 * PER_EPOCH, 4 * epoch)


def test_who_hears_the_reports_needs_no_torch() -> None:
    code = "import sys, jobs.sweep.reports; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
