"""A sweep put together from its events: whatever their order, however often they come, and whatever is missing in them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from orchestrator.errors import IllegalTransition, RunError, TrialError, TrialNotFound
from orchestrator.runs import submission
from orchestrator.runs.events import Event, EventWriter
from orchestrator.runs.result import RunResult, SweepCompute, SweepResult, TrialResult
from orchestrator.runs.states import RunState, TrialState
from orchestrator.runs.sweeps import SweepProgress, trials_to_stop
from orchestrator.spec.job import JobSpec
from orchestrator.store import stop_trials_path


def event(number: int, type: Any = "trial", *, attempt: int = 1, at: float | None = None, **data: Any) -> Event:
    created = 1000.0 + number if at is None else at
    return Event(id=f"a{attempt}-driver-{number}", created_at=created, type=type, data=data)


def trial(number: int, name: str, state: str, *, attempt: int = 1, at: float | None = None, **data: Any) -> Event:
    return event(number, trial=name, state=state, attempt=attempt, at=at, **data)


STORY = [
    event(0, "sweep", plan={"placement": "packed", "why": "8 lanes are 2.1 times as fast as one"}),
    trial(1, "t01", "pending", config={"learning_rate": 1e-3, "train.epochs": 2}),
    trial(2, "t02", "pending", config={"learning_rate": 1e-2, "train.epochs": 2}),
    trial(3, "t01", "running", step=0, total_steps=20),
    trial(4, "t02", "running", step=0, total_steps=20),
    trial(5, "t01", "running", step=10, epoch=1.0, loss=0.9, validation_loss=0.8, tokens=1000),
    trial(6, "t02", "running", step=4, loss=3.0),
    trial(7, "t02", "diverged", step=5, loss=float("nan"), message="The loss is nan at step 5."),
    event(8, "sweep", best="t01", metric=0.8),
    trial(9, "t01", "running", step=15, loss=0.7),
    trial(10, "t01", "finished", step=20, epoch=2.0, loss=0.6, validation_loss=0.7, tokens=2000),
    event(11, "sweep", best="t01", metric=0.7, compute={"steps": 25, "tokens": 2500}),
]


def put_together(events: list[Event]) -> SweepProgress:
    progress = SweepProgress(expected=3)
    for each in events:
        progress.take(each)
    return progress


def test_the_last_of_a_trial_is_the_truth():
    progress = put_together(STORY)
    first, second = progress.trials
    assert (first.state, first.step, first.total_steps, first.epoch) == (TrialState.FINISHED, 20, 20, 2.0)
    assert (first.loss, first.validation_loss, first.tokens) == (0.6, 0.7, 2000)
    assert first.config == {"train.learning_rate": 1e-3, "train.epochs": 2}
    assert (first.losses, first.validation_losses) == ({10: 0.9, 15: 0.7, 20: 0.6}, {10: 0.8, 20: 0.7})
    assert (first.began_at, first.ended_at) == (1003.0, 1010.0)
    assert (second.state, second.loss, second.message) == (TrialState.DIVERGED, 3.0, "The loss is nan at step 5.")
    assert second.value("validation_loss") is None
    assert progress.best is first
    assert progress.compute == {"steps": 25, "tokens": 2500}
    assert progress.plan["placement"] == "packed"
    assert progress.counts() == {TrialState.PENDING: 1, TrialState.FINISHED: 1, TrialState.DIVERGED: 1}


def test_the_best_so_far_has_the_best_figure_whoever_finishes_first():
    progress = put_together(
        [
            trial(1, "t01", "running", step=10, total_steps=30, validation_loss=0.4),
            trial(2, "t02", "finished", step=10, total_steps=10, validation_loss=2.0),
        ]
    )
    running, finished = progress.trials
    assert progress.best is running
    progress.settled = True  # nobody goes on with the other
    assert progress.best is finished


@pytest.mark.parametrize("seed", range(20))
def test_order_and_repetition_of_the_events_do_not_matter(seed: int):
    generator = random.Random(seed)
    shuffled = [*STORY, *generator.sample(STORY, 6)]
    generator.shuffle(shuffled)
    expected, found = put_together(STORY), put_together(shuffled)
    assert found.trials == expected.trials
    assert (found.best, found.plan, found.compute) == (expected.best, expected.plan, expected.compute)
    assert found.seconds_left(1020.0) == expected.seconds_left(1020.0)


def test_an_old_event_does_not_revive_a_trial():
    progress = put_together(STORY)
    progress.take(trial(9, "t01", "running", step=15, loss=0.7))
    assert progress.named["t01"].state is TrialState.FINISHED


def test_a_later_attempt_counts_whatever_its_clock_and_step():
    progress = put_together(STORY[:10])
    progress.take(trial(0, "t01", "running", attempt=2, at=900.0, step=10, loss=0.91))
    assert (progress.named["t01"].step, progress.named["t01"].loss) == (10, 0.91)
    assert progress.named["t01"].losses == {10: 0.91, 15: 0.7}
    progress.take(trial(12, "t01", "stopped", attempt=1, at=2000.0))
    assert progress.named["t01"].state is TrialState.RUNNING


def test_trials_stand_by_their_numbers():
    names = ["t10", "t2", "t100", "t01", "probe"]
    progress = put_together([trial(n, name, "pending") for n, name in enumerate(names)])
    assert [one.name for one in progress.trials] == ["probe", "t01", "t2", "t10", "t100"]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"trial": 3, "state": "running"},
        {"trial": "t01"},
        {"trial": "t01", "state": "hovering"},
        {"trial": "t01", "state": None, "step": None, "loss": None},
        {"trial": "t01", "state": "running", "step": "four", "loss": True, "config": [1], "metrics": 3},
        {"trial": "t01", "state": "running", "loss": float("inf"), "metrics": {"entity_f1": None, "json_valid": "x"}},
    ],
)
def test_events_of_another_kind_do_no_harm(data: dict[str, Any]):
    progress = put_together([*STORY, event(99, **data), event(100, "sweep", best=3, compute=1, plan="packed")])
    assert progress.best is progress.named["t01"]
    assert progress.named["t01"].loss == 0.6
    assert progress.named["t01"].metrics == {}
    assert progress.plan == {"why": "packed"}


def test_an_event_without_a_state_does_not_hide_an_older_one_with_it():
    late = [trial(3, "t01", "running", step=1), event(2, trial="t01", state="stopped")]
    newest = event(5, trial="t01", loss=0.5)
    assert put_together([newest, *late]).named["t01"].state is TrialState.RUNNING


def test_an_empty_sweep_has_nothing():
    progress = SweepProgress(expected=12)
    assert (progress.trials, progress.best, progress.seconds_left(0.0)) == ([], None, None)
    assert progress.counts() == {TrialState.PENDING: 12}


def test_the_best_is_by_the_mode_of_those_that_can_win():
    progress = SweepProgress(metric="entity_f1", mode="max")
    for number, (name, state, value) in enumerate(
        [("t01", "finished", 0.5), ("t02", "finished", 0.6), ("t03", "stopped", 0.9), ("t04", "diverged", 1.0)]
    ):
        progress.take(trial(number, name, state, metrics={"entity_f1": value}))
    assert progress.best is progress.named["t02"]
    assert [one.name for one in progress.ranked()] == ["t03", "t02", "t01"]
    progress.take(event(9, "sweep", best="t01"))
    assert progress.best is progress.named["t01"]
    progress.take(event(10, "sweep", best="t99"))
    assert progress.best is progress.named["t02"], "a name that nobody bears"


def test_of_equal_shares_of_right_answers_the_lowest_loss_is_first():
    progress = SweepProgress(metric="exact_match", mode="max")
    for number, (name, loss) in enumerate([("t01", 0.4), ("t02", 0.2), ("t03", 0.3)]):
        progress.take(trial(number, name, "finished", validation_loss=loss, metrics={"exact_match": 0.5}))
    assert [one.name for one in progress.ranked()] == ["t02", "t03", "t01"]
    assert progress.best is progress.named["t02"]


def test_the_time_left_follows_from_the_steps_so_far_unless_the_job_says_it():
    progress = SweepProgress(expected=3)
    progress.take(trial(0, "t01", "running", step=0, total_steps=20))
    assert progress.seconds_left(1000.0) is None
    progress.take(trial(10, "t01", "running", step=10, total_steps=20))
    # one step a second: 10 steps of this trial, and twice 20 of those that have not begun
    assert progress.seconds_left(1010.0) == pytest.approx(50.0)
    progress.take(trial(20, "t01", "stopped", step=10))
    assert progress.seconds_left(1020.0) == pytest.approx(40.0), "half as fast, and the others as short as the first"
    progress.take(event(21, "sweep", seconds_left=30.0))
    assert progress.seconds_left(1031.0) == pytest.approx(20.0)
    assert progress.seconds_left(9999.0) == 0.0


def test_time_between_attempts_does_not_count():
    progress = SweepProgress(expected=1)
    progress.take(trial(0, "t01", "running", step=0, total_steps=20))
    progress.take(trial(10, "t01", "running", step=10, total_steps=20))
    progress.take(trial(0, "t01", "running", attempt=2, at=90_000.0, step=10, total_steps=20))
    assert progress.seconds_left(90_000.0) == pytest.approx(10.0)


# --- of a run


def sweep_spec(**changes: Any) -> JobSpec:
    sweep = {"search": {"epochs": {"choice": [1, 2, 3]}}, **changes}
    return JobSpec.model_validate(
        {"name": "wide", "base_model": "some/model", "data": {"train": "t.jsonl"}, "sweep": sweep}
    )


def says(world: Any, run: Any, events: list[Event]) -> None:
    writer = EventWriter(world.store, run.id, run.attempt, "driver", interval=60)
    writer.emit("state", state="running")
    for each in events:
        data = dict(each.data)
        writer.emit(each.type, data.pop("message", ""), **data)
    writer.close()
    world.reconcile()


def test_a_sweep_is_a_job_of_its_own_and_its_events_reach_the_database(world):
    run = world.submit(spec=sweep_spec())
    assert world.jobs.jobs[run.submission_id].entrypoint.startswith("python -m jobs.sweep --store ")
    says(world, run, STORY)
    events = submission.repository.list_events(world.db, run.id)
    progress = SweepProgress.of(world.run("wide"), events)
    assert progress.expected == 3
    assert progress.best is progress.named["t01"]
    assert progress.named["t02"].loss == 3.0, "a loss that is no number is null in JSON, and says nothing"


def test_a_sweep_pauses_and_resumes_as_a_run(world):
    run = world.submit(spec=sweep_spec())
    world.says_result(run, RunState.PAUSED)
    run = submission.resume(world.run("wide"), **world.kwargs())
    assert world.jobs.jobs[f"{run.id}-a2"].entrypoint.split()[2] == "jobs.sweep"


def test_the_result_is_the_last_word(world):
    run = world.submit(spec=sweep_spec())
    says(world, run, STORY[:7])
    trials = [
        TrialResult(
            name=name,
            config={"epochs": 1},
            state=state,
            steps=20,
            epochs=2.0,
            metrics=metrics,
            seconds=9.0,
            message=message,
        )
        for name, state, metrics, message in (
            ("t01", TrialState.FINISHED, {"validation_loss": 0.5, "train_loss": 0.4, "entity_f1": 0.9}, ""),
            ("t02", TrialState.DIVERGED, {"validation_loss": float("nan")}, "nan"),
        )
    ]
    assert trials[1].metrics == {}
    compute = SweepCompute(steps=30, tokens=100, separate_steps=60, separate_tokens=250)
    result = SweepResult(
        trials=trials,
        best="t01",
        metric="validation_loss",
        mode="min",
        placement="packed",
        why="faster",
        compute=compute,
    )
    assert result.winner is trials[0]
    world.says_result(run, RunState.SUCCEEDED, sweep=result)
    world.reconcile()
    found = world.run("wide")
    assert RunResult.model_validate_json(found.result.model_dump_json()) == found.result
    progress = SweepProgress.of(found, submission.repository.list_events(world.db, run.id))
    best = progress.best
    assert best is not None
    assert (best.name, best.state, best.validation_loss, best.metrics) == (
        "t01",
        TrialState.FINISHED,
        0.5,
        {"entity_f1": 0.9},
    )
    assert best.losses == {10: 0.9}
    assert (progress.plan["why"], progress.compute["separate_tokens"], progress.settled) == ("faster", 250, True)
    without_events = SweepProgress.of(found).best
    assert without_events is not None
    assert (without_events.name, without_events.validation_loss) == ("t01", 0.5)


def test_a_sweep_of_another_version_can_still_be_looked_at(world):
    run = world.submit(spec=sweep_spec())
    later = run.model_copy(
        update={"spec": {**run.spec, "sweep": {"metric": "perplexity", "search": {"x": {"beam": 1}}}}}
    )
    progress = SweepProgress.of(later, STORY)
    assert (progress.expected, progress.metric) == (None, "perplexity")
    assert len(progress.trials) == 2


# --- ending one trial


def test_trials_are_ended_one_by_one_and_once(world):
    run = world.submit(spec=sweep_spec())
    says(world, run, STORY[:7])
    assert trials_to_stop(world.store, run.id) == frozenset()
    assert submission.stop_trial(world.run("wide"), "t02", **world.kwargs()) is True
    assert submission.stop_trial(world.run("wide"), "t02", **world.kwargs()) is False
    assert submission.stop_trial(world.run("wide"), "t03", **world.kwargs()) is True, "not announced yet"
    assert trials_to_stop(world.store, run.id) == {"t02", "t03"}
    assert world.store.read_json(stop_trials_path(run.id)) == {"stop_trials": ["t02", "t03"]}


def test_what_cannot_be_ended_is_refused_by_name(world):
    run = world.submit(spec=sweep_spec())
    says(world, run, STORY)
    with pytest.raises(TrialError, match="Trial t01 of sweep wide is finished already"):
        submission.stop_trial(run, "t01", **world.kwargs())
    with pytest.raises(TrialError, match="t02 of sweep wide is diverged already"):
        submission.stop_trial(run, "t02", **world.kwargs())
    with pytest.raises(TrialNotFound, match=r"no trial 't04'\. Did you mean t0"):
        submission.stop_trial(run, "t04", **world.kwargs())
    world.says_result(run, RunState.CANCELLED)
    with pytest.raises(IllegalTransition, match="none of its trials runs"):
        submission.stop_trial(run, "t03", **world.kwargs())
    plain = world.submit("plain")
    with pytest.raises(RunError, match="one fine-tune and has no trials"):
        submission.stop_trial(plain, "t01", **world.kwargs())
    assert trials_to_stop(world.store, run.id) == frozenset()


def test_two_who_end_trials_at_once_lose_none(world):
    import threading

    run = world.submit(spec=sweep_spec(search={"seed": {"randint": [1, 8]}}))
    says(world, run, [])
    names = [f"t{number:02d}" for number in range(1, 9)]
    threads = [
        threading.Thread(target=submission.stop_trial, args=(run, name), kwargs=world.kwargs()) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trials_to_stop(world.store, run.id) == set(names)
