"""A run whose spec says `serve`: alias and route, once, whatever is killed. About 10 s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.names import AdapterReference, QualifiedName
from orchestrator.registry.resolving import resolve_references
from orchestrator.registry.versions import Reference, find_version, history
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import find_route, list_revisions, save_route
from orchestrator.runs import reconcile
from orchestrator.runs.client import JobStatus
from orchestrator.runs.repository import list_events, open_attempts
from orchestrator.runs.result import EvaluationResult, RunResult
from orchestrator.runs.states import RunState
from orchestrator.spec.job import JobSpec
from orchestrator.store import result_path

ROUTE = QualifiedName("acme", "entities")
ALIAS = AdapterReference.parse("acme/first@production")


@pytest.fixture(autouse=True)
def signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these runs publish is no adapter that could be signed."""
    monkeypatch.setattr(reconcile, "_sign", lambda *_: None)


def spec(name: str = "first", **fields: Any) -> JobSpec:
    data: dict[str, Any] = {
        "name": name,
        "tenant": "acme",
        "base_model": "some/model",
        "data": {"train": "train.jsonl"},
    }
    return JobSpec.model_validate(data | {"serve": {"route": "entities", "fallback": "base"}} | fields)


def succeeded(world: Any, directory: Path, job: JobSpec) -> Any:
    """A run that has published, and that nobody has looked at since."""
    run = world.submit(spec=job)
    world.succeeds(run, directory)
    return run


def said(world: Any, run: Any) -> list[str]:
    return [event.message for event in list_events(world.db, run.id) if event.id.endswith("-serving")]


def test_its_adapter_gets_the_alias_and_answers_behind_the_route(world: Any, tmp_path: Path) -> None:
    run = succeeded(world, tmp_path / "adapter", spec())
    world.reconcile()
    route = find_route(world.db, ROUTE)
    assert route is not None
    assert route.config["adapters"] == [{"adapter": "acme/first@production", "weight": 1}]
    assert route.config["fallback"] == ["base"]
    assert route.created_by == f"run {run.id}"
    assert resolve_references(world.db, [ALIAS])[ALIAS].digest == world.run("first").adapter
    assert said(world, run) == ["acme/first@production answers behind acme/entities (revision 1)."]
    assert not open_attempts(world.db)


def test_a_route_that_is_there_keeps_what_else_it_says(world: Any, tmp_path: Path) -> None:
    succeeded(world, tmp_path / "adapter", spec())
    world.reconcile()
    now = find_route(world.db, ROUTE)
    assert now is not None
    changed = {**now.config, "defaults": {"system": "Be brief."}}
    save_route(world.db, ROUTE, parse_config(ROUTE, changed), actor="somebody", expected=1)
    succeeded(world, tmp_path / "adapter", spec("second", serve={"route": "entities", "alias": "canary"}))
    world.reconcile()
    route = find_route(world.db, ROUTE)
    assert route is not None
    assert route.config["adapters"][0]["adapter"] == "acme/second@canary"
    assert route.config["fallback"] == []
    assert route.config["defaults"]["system"] == "Be brief."


def test_what_a_person_does_afterwards_stands(world: Any, tmp_path: Path) -> None:
    """The attempt is looked at once more when its job is over."""
    run = succeeded(world, tmp_path / "adapter", spec())
    world.jobs.jobs[run.submission_id].status = JobStatus.RUNNING
    world.reconcile()
    assert open_attempts(world.db), "its job is not over"
    empty = parse_config(ROUTE, {"base_model": "some/model"})
    save_route(world.db, ROUTE, empty, actor="somebody", expected=1)
    world.jobs.jobs[run.submission_id].status = JobStatus.SUCCEEDED
    world.reconcile()
    assert not open_attempts(world.db)
    assert [each.created_by for each in list_revisions(world.db, ROUTE)] == ["somebody", f"run {run.id}"]


def evaluated(world: Any, run: Any, before: float, after: float, few_shot: float | None = None) -> None:
    found = RunResult.model_validate(world.store.read_json(result_path(run.id)))
    shown = None if few_shot is None else {"exact_match": few_shot}
    evaluation = EvaluationResult(
        rows=9, before={"exact_match": before}, few_shot=shown, examples=3, after={"exact_match": after}
    )
    world.store.write_json(
        result_path(run.id), found.model_copy(update={"evaluation": evaluation}).model_dump(mode="json")
    )


@pytest.mark.parametrize(("after", "served"), [(0.4, False), (0.5, True), (0.6, True)])
def test_one_that_answers_worse_than_the_base_model_is_not_served(
    world: Any, tmp_path: Path, after: float, served: bool
) -> None:
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    run = succeeded(world, tmp_path / "adapter", spec(data=data, evaluate={"metrics": ["exact_match"]}))
    evaluated(world, run, 0.5, after)
    world.reconcile()
    assert (find_route(world.db, ROUTE) is not None) is served
    assert world.run("first").state is RunState.SUCCEEDED
    if not served:
        assert said(world, run) == ["exact_match fell from 0.500 to 0.400: it is not put behind acme/entities."]


def test_a_run_that_failed_serves_nothing(world: Any) -> None:
    run = world.submit(spec=spec())
    world.says_result(run, RunState.FAILED, error={"code": "x", "message": "No."})
    world.reconcile()
    assert find_route(world.db, ROUTE) is None
    assert said(world, run) == []


def test_an_adapter_that_was_not_taken_in_is_said(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "_sign", lambda *_: "it is empty")
    run = succeeded(world, tmp_path / "adapter", spec())
    world.reconcile()
    (message,) = said(world, run)
    assert message.startswith("It cannot be put behind acme/entities: ")
    assert world.run("first").state is RunState.SUCCEEDED
    assert not open_attempts(world.db)


def test_killed_anywhere_it_is_served_once(killed_everywhere: Any, tmp_path: Path) -> None:
    def prepare(world: Any) -> Any:
        return succeeded(world, tmp_path / "adapter", spec())

    for world in killed_everywhere(prepare, lambda world, _: world.reconcile()):
        world.reconcile()
        run = world.run("first")
        assert run.state is RunState.SUCCEEDED
        assert [each.revision for each in list_revisions(world.db, ROUTE)] == [1]
        alias = Reference(tenant="acme", name="first", selector="production")
        assert len(history(world.db, alias)) == 1
        assert find_version(world.db, alias).digest == run.adapter
        assert len(said(world, run)) == 1
        assert not open_attempts(world.db)


@pytest.mark.parametrize(
    ("serve", "field"),
    [
        ({"route": "acme/entities"}, "serve.route"),
        ({"route": "entities", "alias": "3"}, "serve.alias"),
        ({"route": "entities", "fallback": "nobody"}, "serve.fallback"),
        ({}, "serve.route"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_spec(serve: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match="serve") as caught:
        spec(serve=serve)
    assert field in [".".join(map(str, error["loc"])) for error in caught.value.errors()]  # type: ignore[attr-defined]


def test_full_tuning_has_nothing_to_serve() -> None:
    with pytest.raises(ValueError, match=r"tuning\.type full makes none"):
        spec(tuning={"type": "full"})


@pytest.mark.parametrize(("after", "served"), [(0.6, False), (0.7, True)])
def test_nor_is_one_that_a_few_examples_beat(world: Any, tmp_path: Path, after: float, served: bool) -> None:
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    evaluate = {"metrics": ["exact_match"], "baseline": {"few_shot": 3}}
    run = succeeded(world, tmp_path / "adapter", spec(data=data, evaluate=evaluate))
    evaluated(world, run, 0.5, after, few_shot=0.7)
    world.reconcile()
    assert (find_route(world.db, ROUTE) is not None) is served
    if not served:
        assert said(world, run) == [
            "exact_match is 0.600, and the base model with 3 examples before each question has 0.700: it is not put behind acme/entities."
        ]
