"""Finished trials evaluated on a tiny model: each as it would be alone, one rank for all, and training none the wiser. fp32; about ten
seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from jobs.data import TestRow
from jobs.evaluate import Candidate, answer
from jobs.evaluate.metrics import score
from jobs.sweep import measuring
from jobs.sweep.measuring import Measure
from jobs.train.session import Session
from jobs.train.setup import Place
from orchestrator.modeling.loading import load_model
from orchestrator.spec.job import JobSpec
from tests.unit.sweep.conftest import follow, group_of, made_spec, packed, same

EVALUATE = {"metrics": ["exact_match", "json_valid"], "max_new_tokens": 6}


class Said:
    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, Any]]] = []

    def emit(self, type: str, message: str = "", **data: Any) -> None:
        self.events.append((type, message, data))


@pytest.fixture
def base(tiny_model: Any) -> Path:
    return tiny_model("llama")


@pytest.fixture
def questions(entities_rows: Any) -> list[TestRow]:
    return [TestRow(row["messages"][:-1], None, row["messages"][-1]["content"]) for row in entities_rows[:4]]


@pytest.fixture
def adapters(base: Path, rows: Any, tmp_path: Path) -> dict[str, Path]:
    """Of three trials, trained for six steps."""
    group = group_of(base, rows)
    names = ["one", "two", "three"]
    for number, trial in enumerate(names):
        group.open(trial, made_spec(train__learning_rate=1e-2 * (number + 1), tuning__rank=4))
    follow(group, {})
    for trial in names:
        group.write_adapter(trial, tmp_path / trial, "tiny")
    return {trial: tmp_path / trial for trial in names}


def session(place: Place, tmp_path: Path, said: Said | None = None) -> Any:
    spec = JobSpec.model_validate(
        made_spec().model_dump() | {"data": {"train": "r", "test": "t"}, "evaluate": EVALUATE}
    )
    resolved: Any = SimpleNamespace(spec=spec)
    store: Any = None
    return Session(resolved, 1, store, tmp_path, place, said if place.rank == 0 else None)


def test_each_scores_what_it_scores_alone(
    base: Path, questions: Any, adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, tokenizer = load_model(base, dtype=torch.float32), AutoTokenizer.from_pretrained(base)
    answers = {
        trial: answer(network, tokenizer, questions, [Candidate(directory=path)], 6)[0]
        for trial, path in adapters.items()
    }
    assert len({tuple(given) for given in answers.values()}) == 3, "the trials have learnt different things"
    two = answers["two"]
    asked = [TestRow(row.messages, None, said) for row, said in zip(questions, [*two[:3], "else"], strict=True)]
    expected = [row.answer for row in asked]
    monkeypatch.setattr(measuring, "AT_ONCE", 2)
    said = Said()
    found = Measure(session(Place(), tmp_path, said), network, tokenizer, asked)(adapters)
    assert found == {trial: {"metrics": score(EVALUATE["metrics"], expected, answers[trial])} for trial in adapters}  # type: ignore[arg-type]
    assert found["two"]["metrics"]["exact_match"] == 0.75
    assert [data for type, _, data in said.events if type == "progress"][-1]["done"] == 4, "one in the second batch"


def test_one_that_cannot_be_evaluated_costs_no_other_its_metric(
    base: Path, questions: Any, adapters: Any, tmp_path: Path
) -> None:
    shutil.rmtree(adapters["two"])
    network, tokenizer = load_model(base, dtype=torch.float32), AutoTokenizer.from_pretrained(base)
    said = Said()
    found = Measure(session(Place(), tmp_path, said), network, tokenizer, questions)(adapters)
    assert [list(found[trial]) for trial in ("one", "two", "three")] == [["metrics"], ["message"], ["metrics"]]
    assert found["two"]["message"].startswith("could not be evaluated: ")
    assert [type for type, *_ in said.events if type == "message"] == ["message"]


@pytest.mark.parametrize("beat", [60.0, 0.0])
def test_of_several_workers_one_answers_and_all_know(
    base: Path,
    questions: Any,
    adapters: Any,
    tmp_path: Path,
    as_ranks: Any,
    beat: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where it takes so long that the others hear of it after every answer."""
    monkeypatch.setattr(measuring, "BEAT_SECONDS", beat)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def work(place: Place) -> Any:
        first = place.rank == 0
        network = load_model(base, dtype=torch.float32) if first else None
        measure = Measure(session(place, tmp_path, Said()), network, tokenizer, questions if first else [])
        return measure(adapters if first else {trial: Path("elsewhere") for trial in adapters})

    one, other = as_ranks(2, work)
    assert one == other
    assert list(one) == list(adapters)


def test_those_that_go_on_are_trained_as_if_nobody_had_been_measured(
    base: Path, rows: Any, questions: Any, tmp_path: Path
) -> None:
    """To the last bit, with dropout: a short trial is measured while a long one is under way."""
    specs = {
        "short": made_spec(train__epochs=1, tuning__dropout=0.1),
        "long": made_spec(train__learning_rate=5e-3, train__epochs=3, tuning__dropout=0.1),
    }
    undisturbed = packed(group_of(base, rows), specs)
    network, tokenizer = load_model(base, dtype=torch.float32), AutoTokenizer.from_pretrained(base)
    group = group_of(base, rows, network=network)
    for trial, spec in specs.items():
        group.open(trial, spec)
    courses = follow(group, {}, steps=3)
    assert group.finished == ["short"]
    group.write_adapter("short", tmp_path / "short", "tiny")
    measured = Measure(session(Place(), tmp_path, Said()), network, tokenizer, questions)({"short": tmp_path / "short"})
    assert "metrics" in measured["short"]
    follow(group, courses)
    assert same(courses["long"], undisturbed["long"])
    assert len(courses["long"]) == 9


def test_evaluating_has_its_seconds_to_itself_and_training_is_said_again(tmp_path: Path) -> None:
    said = Said()
    ours = session(Place(), tmp_path, said)
    with ours.phase("training"), ours.phase("evaluating"):
        torch.ones(1).sum()
    assert [data["phase"] for type, _, data in said.events if type == "phase"] == ["training", "evaluating", "training"]
    ours.seconds.clear()
    clock = iter([0.0, 2.0, 7.0, 10.0])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jobs.train.session.time.perf_counter", lambda: next(clock))
        with ours.phase("training"), ours.phase("evaluating"):
            pass
    assert ours.seconds == {"training": 5.0, "evaluating": 5.0}

    def flush(self) -> None: ...
