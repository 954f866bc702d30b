"""Leases and reports: what the two sides are told when either of them dies, is late, or repeats itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from jobs.sweep import broker as broker_module
from jobs.sweep.broker import LEASE_SECONDS, RUNG, Broker, Dismissed, Orders

CONFIG = {"train.learning_rate": 1e-3}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def broker(clock: Clock) -> Broker:
    return Broker(clock)


def run(made: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(made)


def said(step: int, state: str = "running") -> dict[str, Any]:
    return {"step": step, "state": state}


def test_a_course_from_lease_to_end(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        assert await broker.sync({}) == Orders(open={"t1": CONFIG})
        assert await broker.sync({}) == Orders(), "said once"
        assert await broker.report("t1", "a", 0, patience=0) is None
        assert await broker.sync({"t1": [said(4)]}) == Orders()
        assert await broker.report("t1", "a", 0) == said(4)
        await broker.sync({"t1": [said(8, "finished")]})
        assert await broker.report("t1", "a", 1) == said(8, "finished")
        await broker.release("t1", "a")
        assert await broker.sync({}) == Orders(), "what has ended has freed its place already"

    run(course())


def test_a_question_waits_for_its_report(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        asking = asyncio.create_task(broker.report("t1", "a", 0))
        await asyncio.sleep(0)
        assert not asking.done()
        await broker.sync({"t1": [said(4)]})
        assert await asking == said(4)

    run(course())


def test_who_waits_when_tune_has_ended_is_dismissed(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        asking = asyncio.create_task(broker.report("t1", "a", 0))
        await asyncio.sleep(0)
        await broker.dismiss()
        with pytest.raises(Dismissed):
            await asking
        with pytest.raises(Dismissed):
            await broker.report("t1", "a", 0)
        await broker.release("t1", "a")

    run(course())


def test_a_group_without_work_waits_for_a_trial(broker: Broker) -> None:
    async def course() -> None:
        waiting = asyncio.create_task(broker.sync({}, patience=30))
        await asyncio.sleep(0)
        await broker.lease("t1", CONFIG, "a")
        assert await waiting == Orders(open={"t1": CONFIG})

    run(course())


def test_a_stopped_trial_frees_its_place(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        await broker.sync({})
        await broker.release("t1", "a")
        assert await broker.sync({}) == Orders(close=["t1"])
        with pytest.raises(LookupError, match="t1"):
            await broker.report("t1", "a", 0)

    run(course())


def test_one_that_was_never_given_a_place_needs_none_taken(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        await broker.release("t1", "a")
        assert await broker.sync({}) == Orders()

    run(course())


def test_a_killed_trial_loses_its_place(broker: Broker, clock: Clock) -> None:
    async def course() -> None:
        await broker.lease("dead", CONFIG, "a")
        await broker.lease("alive", CONFIG, "b")
        await broker.sync({})
        clock.now += LEASE_SECONDS - 1
        assert await broker.report("alive", "b", 0, patience=0) is None
        assert await broker.sync({}) == Orders()
        clock.now += 2
        assert await broker.sync({}) == Orders(close=["dead"])

    run(course())


def test_started_again_it_goes_on_and_the_old_process_is_out(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "old")
        await broker.sync({})
        await broker.sync({"t1": [said(4)]})
        await broker.lease("t1", CONFIG, "new")
        assert await broker.sync({}) == Orders(), "its course in the group goes on"
        assert await broker.report("t1", "new", 0) == said(4)
        with pytest.raises(LookupError):
            await broker.report("t1", "old", 0)
        await broker.release("t1", "old")
        assert await broker.report("t1", "new", 0) == said(4), "who has no lease cannot give it back"

    run(course())


def test_a_new_group_gets_all_that_has_not_ended_and_repeats_itself(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        await broker.lease("t2", CONFIG, "b")
        await broker.sync({})
        await broker.sync({"t1": [said(4)], "t2": [said(4), said(8, "finished")]})
        await broker.hello()
        assert await broker.sync({}) == Orders(open={"t1": CONFIG})
        await broker.sync({"t1": [said(4), said(8)]})
        assert [await broker.report("t1", "a", n) for n in (0, 1)] == [said(4), said(8)]
        assert await broker.report("t1", "a", 2, patience=0) is None

    run(course())


def test_one_that_diverges_at_a_step_already_told_has_ended(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        await broker.sync({"t1": [said(4)]})
        await broker.sync({"t1": [said(4, "diverged")]})
        assert await broker.report("t1", "a", 1) == said(4, "diverged")

    run(course())


def test_one_that_a_person_ends_is_told_so_and_frees_its_place(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        await broker.sync({})
        await broker.sync({"t1": [said(4)]})
        await broker.end("t1", "stopped", "by a person")
        assert await broker.report("t1", "a", 1) == {**said(4, "stopped"), "message": "by a person"}
        assert await broker.sync({}) == Orders(close=["t1"])
        await broker.end("t1", "stopped", "again")
        await broker.release("t1", "a")
        assert await broker.sync({}) == Orders()

    run(course())


def test_what_was_decided_before_is_not_decided_again(broker: Broker) -> None:
    async def course() -> None:
        await broker.decided({"t1": 4})
        await broker.lease("t1", CONFIG, "a")
        await broker.sync({"t1": [said(4) | {RUNG: 1.0}, said(8) | {RUNG: 2.0}]})
        assert await broker.report("t1", "a", 0) == said(4)
        assert await broker.report("t1", "a", 1) == said(8) | {RUNG: 2.0}

    run(course())


def test_nothing_revives_a_trial_that_has_ended(broker: Broker) -> None:
    async def course() -> None:
        assert not await broker.end("t1", "stopped", "too early: it has no place yet")
        await broker.lease("t1", CONFIG, "a")
        await broker.sync({})
        assert await broker.end("t1", "stopped", "by a person")
        await broker.sync({"t1": [said(4)]})
        await broker.hello()
        assert await broker.sync({}) == Orders(), "nor a group that is started anew"

    run(course())


def test_the_end_is_said_once_all_else_is(broker: Broker) -> None:
    async def course() -> None:
        waiting = asyncio.create_task(broker.sync({}, patience=30))
        await asyncio.sleep(0)
        await broker.finish("t1", {"best": "t01"})
        await broker.finish(None, None)
        end = Orders(finish=True, best="t1", sweep={"best": "t01"})
        assert [await waiting, await broker.sync({})] == [end, end]

    run(course())


def test_the_group_hears_who_was_stopped_before_it_takes_the_next_step(broker: Broker) -> None:
    async def course() -> None:
        for trial in ("good", "bad"):
            await broker.lease(trial, CONFIG, trial)
        await broker.sync({})
        asking = {trial: asyncio.create_task(broker.report(trial, trial, 0)) for trial in ("good", "bad")}
        await asyncio.sleep(0)
        rung = said(4) | {RUNG: 1.0}
        stepping = asyncio.create_task(broker.sync({"good": [rung], "bad": [rung]}))
        assert await asking["good"] == await asking["bad"] == rung
        assert not stepping.done(), "both are with the scheduler"
        await broker.release("bad")
        await asyncio.sleep(0.01)
        assert not stepping.done(), "one of them is"
        going_on = asyncio.create_task(broker.report("good", "good", 1))
        assert await stepping == Orders(close=["bad"])
        going_on.cancel()

    run(course())


def test_a_scheduler_that_does_not_answer_holds_nobody_up_for_long(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "DECISION_SECONDS", 0.05)

    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        await broker.sync({})
        asking = asyncio.create_task(broker.report("t1", "a", 0))
        await asyncio.sleep(0)
        assert await broker.sync({"t1": [said(4) | {RUNG: 1.0}]}) == Orders()
        assert await asking == said(4) | {RUNG: 1.0}

    run(course())


# --- groups that have one trial at a time ---------------------------------------------------------------------------


def test_a_group_of_one_trial_hears_what_the_scheduler_decides(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        assert await broker.assign("g1") == Orders(open={"t1": CONFIG})
        asking = asyncio.create_task(broker.report("t1", "a", 0))
        await asyncio.sleep(0)
        rung = said(4) | {RUNG: 1.0}
        telling = asyncio.create_task(broker.tell("t1", "g1", [rung]))
        assert await asking == rung
        await asyncio.sleep(0.01)
        assert not telling.done(), "it is with the scheduler"
        again = asyncio.create_task(broker.report("t1", "a", 1))
        assert await telling is None, "it goes on"
        again.cancel()
        await broker.release("t1")
        assert await broker.tell("t1", "g1", []) == "cancel"
        assert not await broker.goes_on("t1")

    run(course())


def test_people_see_where_a_trial_is_and_an_end_from_outside_knows(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        await broker.tell("t1", "g1", [said(4) | {RUNG: 1.0, "validation_loss": 0.5}])
        await broker.tell("t1", "g1", [], said(7))
        assert await broker.progress() == {"t1": said(7)}
        await broker.end("t1", "diverged", "the loss is no number")
        assert await broker.tell("t1", "g1", [], said(8)) == "cancel"
        await broker.report("t1", "a", 0)
        last = await broker.report("t1", "a", 1)
        assert last == said(7, "diverged") | {"validation_loss": 0.5, "message": "the loss is no number"}

    run(course())


def test_a_group_keeps_its_trial_until_that_has_ended_and_gets_the_next(broker: Broker) -> None:
    async def course() -> None:
        for trial in ("t1", "t2", "t3"):
            await broker.lease(trial, CONFIG, "a")
        assert await broker.assign("g1", to_start=True) == Orders(open={"t1": CONFIG})
        assert await broker.assign("g2", to_start=True) == Orders(open={"t2": CONFIG})
        assert await broker.assign("g1") == Orders(open={"t1": CONFIG}), "its worker was started again"
        await broker.tell("t1", "g1", [said(8, "finished")])
        assert await broker.assign("g1") == Orders(open={"t3": CONFIG})
        await broker.tell("t3", "g1", [said(8, "finished")])
        assert await broker.assign("g1") == Orders()

    run(course())


def test_who_waits_gets_a_trial_before_another_group_is_started_for_it(broker: Broker) -> None:
    async def course() -> None:
        waiting = asyncio.create_task(broker.assign("g1", 5.0))
        await asyncio.sleep(0)
        starting = asyncio.create_task(broker.assign("g2", 5.0, to_start=True))
        await asyncio.sleep(0)
        await broker.lease("t1", CONFIG, "a")
        assert await waiting == Orders(open={"t1": CONFIG})
        await asyncio.sleep(0.01)
        assert not starting.done()
        await broker.lease("t2", CONFIG, "a")
        assert await starting == Orders(open={"t2": CONFIG})

    run(course())


def test_a_trial_whose_group_ended_too_early_is_another_ones(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        await broker.assign("g1")
        assert await broker.left("g1") is None
        assert await broker.assign("g2") == Orders(open={"t1": CONFIG})
        assert await broker.left("g1", "failed", "late") is None, "it is not its own any more"
        assert await broker.left("g2", "failed", "no such layer") == "t1"
        last = await broker.report("t1", "a", 0)
        assert last is not None
        assert (last["state"], last["message"]) == ("failed", "no such layer")
        assert await broker.left("g2", "failed", "again") is None

    run(course())


def test_failures_are_counted_by_trial(broker: Broker) -> None:
    async def course() -> None:
        for trial in ("t1", "t2"):
            await broker.lease(trial, CONFIG, "a")
        await broker.assign("g1")
        assert [await broker.failed("g1") for _ in range(2)] == [1, 2]
        await broker.tell("t1", "g1", [said(8, "finished")])
        await broker.assign("g1")
        assert await broker.failed("g1") == 1
        await broker.left("g1")
        await broker.assign("g2")
        assert await broker.failed("g2") == 2, "of the trial, whoever has it"
        assert [await broker.failed("g3") for _ in range(2)] == [1, 2], "without one, of the group"

    run(course())


def test_all_groups_hear_that_the_sweep_winds_down(broker: Broker) -> None:
    async def course() -> None:
        await broker.lease("t1", CONFIG, "a")
        assert await broker.tell("t1", "g1", []) is None
        waiting = asyncio.create_task(broker.assign("g2", 60.0))
        await asyncio.sleep(0)
        await broker.wind_down("pause")
        assert await waiting == Orders()
        assert await broker.tell("t1", "g1", [], said(3)) == "pause"
        assert await broker.assign("g1") == Orders(), "not its trial again"

    run(course())


def test_one_group_sees_to_the_winner(broker: Broker) -> None:
    async def course() -> None:
        waiting = [asyncio.create_task(broker.assign(group, 60.0)) for group in ("g1", "g2")]
        await asyncio.sleep(0)
        assert await broker.crowner() is None
        await broker.finish("t1", {"trials": []})
        first, second = [await one for one in waiting]
        assert (first.finish, first.best, second) == (True, "t1", Orders())
        assert await broker.crowner() == "g1"
        assert await broker.assign("g1") == first, "its worker was started again"
        assert await broker.assign("g3", to_start=True) == Orders()

    run(course())


def test_after_a_broker_was_killed_groups_keep_the_trials_that_they_have() -> None:
    now = [0.0]
    broker = Broker(clock=lambda: now[0], again=True)

    async def course() -> None:
        for trial in ("t1", "t2"):
            await broker.lease(trial, CONFIG, "a")
        assert await broker.assign("g2", to_start=True) == Orders(), "nobody knows yet whose they are"
        assert await broker.tell("t1", "g1", [], said(3)) is None
        assert await broker.tell("t1", "g2", []) == "cancel", "another has it"
        assert await broker.assign("g1") == Orders(open={"t1": CONFIG})
        now[0] += broker_module.SETTLING_SECONDS
        assert await broker.assign("g2", to_start=True) == Orders(open={"t2": CONFIG})

    run(course())


def test_a_new_group_begins_with_all_trials_that_a_sweep_begins_with(clock: Clock) -> None:
    broker = Broker(clock, first=2)

    async def course() -> None:
        await broker.hello()
        await broker.lease("t1", CONFIG, "a")
        assert await broker.sync({}) == Orders()
        waiting = asyncio.create_task(broker.sync({}, patience=30))
        await asyncio.sleep(0)
        assert not waiting.done()
        await broker.lease("t2", CONFIG, "b")
        assert await waiting == Orders(open={"t1": CONFIG, "t2": CONFIG})
        await broker.release("t1", "a")
        await broker.hello()
        assert await broker.sync({}) == Orders(open={"t2": CONFIG}), "the next group waits for nobody"

    run(course())


def test_it_waits_neither_for_long_nor_once_the_sweep_has_ended(clock: Clock) -> None:
    async def begun(broker: Broker) -> Broker:
        await broker.hello()
        await broker.lease("t1", CONFIG, "a")
        assert await broker.sync({}) == Orders()
        return broker

    async def course() -> None:
        broker = await begun(Broker(clock, first=3))
        clock.now += broker_module.GATHERING_SECONDS
        assert await broker.sync({}) == Orders(open={"t1": CONFIG})
        await broker.lease("t2", CONFIG, "b")
        assert await broker.sync({}) == Orders(open={"t2": CONFIG})
        broker = await begun(Broker(clock, first=3))
        await broker.finish(None, None)
        assert (await broker.sync({})).finish
        broker = Broker(clock, first=3, again=True)
        await broker.lease("t1", CONFIG, "a")
        assert await broker.sync({}) == Orders(open={"t1": CONFIG}), "who comes back to another broker was there before"

    run(course())


def test_the_driver_knows_when_a_worker_is_there(broker: Broker) -> None:
    async def course() -> None:
        assert not await broker.worker(patience=0.01)
        waiting = asyncio.create_task(broker.worker(patience=30))
        await asyncio.sleep(0)
        await broker.coming()
        assert await waiting
        assert await broker.worker(patience=0)

    run(course())
