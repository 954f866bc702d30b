"""Sweeps whose trials train apart, on a real Ray of two CPUs: groups of Ray Train's workers have one trial each at a
time, and any process may be killed. About eight minutes on two quiet cores, most of it starts of processes.

Each sweep is `python -m jobs.sweep` in a process of its own, on a tiny model in fp32.
"""

from __future__ import annotations

from typing import Any

import pytest
import ray

from orchestrator.runs.events import Event, read_events
from orchestrator.runs.states import RunState, TrialState
from orchestrator.store import adapter_path, control_path, separate_path, stop_trials_path, trial_path
from tests.integration.sweep_process import EVALUATE, actors, kill, patiently, solo, trials, values

pytestmark = [pytest.mark.slow, pytest.mark.ray]

FULL = {"type": "full"}
ONE_CPU = {"cpus_per_worker": 1, "max_failures": 2}
GRID = {
    "search": {"learning_rate": {"grid": [1e-3, 2e-4]}, "epochs": {"grid": [1, 2]}},
    "searcher": "grid",
    "scheduler": "none",
}
LONG = GRID | {"search": {"epochs": {"grid": [30, 31]}}}


def nothing_is_left() -> bool:
    """No group's process lives, and the cluster has all its CPUs again."""

    def gone() -> bool:
        free = ray.available_resources().get("CPU", 0)
        return not actors("RayTrainWorker", "TrainController") and free == ray.cluster_resources()["CPU"]

    return patiently(gone)


def test_full_tuning_is_tried_as_many_at_once_as_fit_and_each_is_its_own_run(make_job: Any, start: Any) -> None:
    job = make_job(tuning=FULL, resources=ONE_CPU, sweep=GRID)
    running = start(job)
    result = running.end()
    sweep = trials(result)
    assert (sweep.placement, [one.state for one in sweep.trials]) == ("concurrent", [TrialState.FINISHED] * 4)
    assert sweep.why.endswith("2 trials at once: each takes 1 CPU of 2")
    alone = {one.name: solo(make_job, job, one) for one in sweep.trials}
    for one in sweep.trials:
        expected = alone[one.name].metrics
        assert one.metrics["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-5)
        assert one.steps == expected["steps"]
    assert sweep.best is not None
    assert sweep.best == min(alone, key=lambda name: alone[name].metrics["validation_loss"])
    assert result.metrics["validation_loss"] == pytest.approx(alone[sweep.best].metrics["validation_loss"], abs=1e-5)
    assert result.adapter is not None
    assert job.store.manifest(adapter_path(result.adapter)) is not None
    assert sweep.compute.steps == sweep.compute.separate_steps == sum(one.steps for one in sweep.trials) == 24
    assert sweep.compute.tokens == sweep.compute.separate_tokens > 0
    run = job.resolved.run
    assert not job.store.list(separate_path(run)), "checkpoints and the like go with the sweep's end"
    assert not job.store.list(trial_path(run, "")[:-1]), "whole weights are kept once, where they are published"
    assert not [event for event in read_events(job.store, run) if event.type == "metrics"], (
        "trials have their own events"
    )


def test_who_is_stopped_leaves_nothing_running(make_job: Any, start: Any) -> None:
    """The second has the first before it at its first rung; the third begins once it has gone."""
    search = {"learning_rate": {"grid": [1e-3, 1e-7, 2e-3]}, "epochs": {"grid": [20]}}
    space = {"search": search, "searcher": "grid", "reduction_factor": 2, "max_concurrent": 1}
    running = start(make_job(tuning=FULL, resources=ONE_CPU, sweep=space))
    running.until(lambda: [e for e in running.events("trial") if e.data["trial"] == "t03" and "step" in e.data])
    assert len(actors("RayTrainWorker")) == 1
    sweep = trials(running.end())
    first, second, _ = sweep.trials
    assert (first.state, first.steps) == (TrialState.FINISHED, 80)
    assert (second.state, second.steps) == (TrialState.STOPPED, 4), "at the end of an epoch, and no step later"
    assert second.message == "stopped by the scheduler"
    assert nothing_is_left()


def test_a_sweep_that_was_paused_and_then_killed_repeats_nothing(make_job: Any, start: Any) -> None:
    """Paused when one trial has finished, and killed when another one has come further than it was then."""
    job = make_job(
        tuning=FULL,
        resources=ONE_CPU,
        sweep=LONG | {"placement": "one_by_one"},
        train={"learning_rate": 1e-3, "checkpoint": {"every": 5}},
    )
    run = job.resolved.run

    def of(attempt: int) -> list[Event]:
        return [event for event in first.events("trial") if event.id.startswith(f"a{attempt}-")]

    def finished(attempt: int) -> set[str]:
        return {event.data["trial"] for event in of(attempt) if event.data["state"] == "finished"}

    def come_to(attempt: int, step: int) -> bool:
        """A trial, another than those that had finished before."""
        return any(e.data["trial"] not in finished(1) and e.data.get("step", 0) >= step for e in of(attempt))

    first = start(job)
    first.until(lambda: finished(1) and come_to(1, 30))
    job.store.write_json(control_path(run, 1), {"action": "pause"})
    assert first.end().state is RunState.PAUSED
    assert nothing_is_left()
    second = start(job, attempt=2)
    second.until(lambda: come_to(2, 60))
    second.process.kill()
    second.process.wait()
    assert nothing_is_left()
    sweep = trials(start(job, attempt=3).end())
    assert (sweep.placement, [one.state for one in sweep.trials]) == ("one_by_one", [TrialState.FINISHED] * 2)
    for attempt, begun in ((2, 0), (3, 30)):
        running = [e for e in of(attempt) if e.data["state"] == "running"]
        assert {e.data["trial"] for e in running}.isdisjoint(finished(1))
        assert min(e.data["step"] for e in running if "step" in e.data) > begun
    for one in sweep.trials:
        alone = solo(make_job, job, one).metrics
        assert one.metrics["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-4)


def test_killed_workers_and_killed_trials_change_nothing(make_job: Any, start: Any) -> None:
    search = {"learning_rate": {"grid": [1e-3, 2e-4]}, "epochs": {"grid": [20]}}
    space = {"search": search, "searcher": "grid", "scheduler": "none"}
    job = make_job(tuning=FULL, resources=ONE_CPU, sweep=space, train={"checkpoint": {"every": 8}})
    running = start(job)
    running.until(lambda: len({e.data["trial"] for e in running.events("trial") if e.data.get("step", 0) > 12}) == 2)
    assert len(actors("RayTrainWorker")) == 2
    kill("RayTrainWorker")
    kill("ThinTrial", "ResourceTrainable")  # Tune wraps the class
    sweep = trials(running.end())
    alone = {one.name: solo(make_job, job, one).metrics["validation_loss"] for one in sweep.trials}
    assert values(sweep) == pytest.approx(alone, rel=1e-4)
    assert nothing_is_left()


def test_one_diverges_one_is_stopped_by_a_person_and_the_third_wins(make_job: Any, start: Any) -> None:
    """QLoRA, whose adapters are kept."""
    space = {"search": {"learning_rate": {"grid": [5e-3, 6e-3, 90.0]}}, "searcher": "grid", "scheduler": "none"}
    job = make_job(
        tuning={"type": "qlora", "rank": 4},
        resources=ONE_CPU,
        sweep=space | {"max_concurrent": 1},
        train={"max_grad_norm": None, "epochs": 40},
    )
    running = start(job)
    under_way = running.until(
        lambda: [
            e for e in running.events("trial") if e.data["config"]["train.learning_rate"] == 6e-3 and "step" in e.data
        ]
    )
    job.store.write_json(stop_trials_path(job.resolved.run), {"stop_trials": [under_way[0].data["trial"]]})
    sweep = trials(running.end())
    by_rate = {one.config["train.learning_rate"]: one for one in sweep.trials}
    assert {rate: one.state for rate, one in by_rate.items()} == {
        5e-3: TrialState.FINISHED,
        6e-3: TrialState.STOPPED,
        90.0: TrialState.DIVERGED,
    }
    assert by_rate[6e-3].message == "stopped by a person"
    assert "diverged at step" in by_rate[90.0].message
    assert sweep.winner is by_rate[5e-3]
    assert sweep.why.endswith("1 trial at once: each takes 1 CPU of 2, and sweep.max_concurrent is 1")


def test_a_trial_may_have_several_workers(make_job: Any, start: Any) -> None:
    """Two ranks over gloo and ZeRO 2; the worse is stopped on both after the same step."""
    search = {"learning_rate": {"grid": [1e-3, 1e-7]}, "epochs": {"grid": [3]}}
    space = {"search": search, "searcher": "grid", "reduction_factor": 2}
    sweep = trials(start(make_job(tuning=FULL, resources=ONE_CPU | {"workers": 2}, sweep=space)).end())
    assert sweep.why.endswith("1 trial at once: each takes 2 CPUs of 2")
    assert [(one.state, one.steps) for one in sweep.trials] == [(TrialState.FINISHED, 12), (TrialState.STOPPED, 4)]
    assert nothing_is_left()


def test_a_network_that_cannot_be_shared_parts_the_trials(make_job: Any, start: Any) -> None:
    space = {"search": {"learning_rate": {"grid": [5e-3, 1e-3]}}, "searcher": "grid", "scheduler": "none"}
    sweep = trials(start(make_job(model="phi", sweep=space)).end())
    assert [one.state for one in sweep.trials] == [TrialState.FINISHED] * 2
    assert sweep.placement == "concurrent"
    assert "plain path" in sweep.why
    assert sweep.why.endswith(
        "1 trial at once: each takes 2 CPUs of 2; with resources.cpus_per_worker: 1 there is room for 2"
    )


def test_the_best_answers_win(by_answers: Any, start: Any) -> None:
    space = {"search": {"epochs": {"grid": [5, 60]}}, "searcher": "grid", "scheduler": "none", "metric": "entity_f1"}
    train = {"learning_rate": 2e-3, "warmup_steps": 2, "epochs": 60}
    result = start(by_answers(space, tuning=FULL, resources=ONE_CPU, train=train)).end()
    sweep = trials(result)
    by_epochs = {one.config["train.epochs"]: one for one in sweep.trials}
    assert sweep.winner is by_epochs[60]
    assert by_epochs[60].metrics["entity_f1"] > by_epochs[5].metrics["entity_f1"] == 0.0
    assert result.evaluation is not None
    assert result.evaluation.after == {name: by_epochs[60].metrics[name] for name in EVALUATE["metrics"]}, (
        "the same rows"
    )
