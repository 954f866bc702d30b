"""A flood from one tenant beside others who behave: counted in steps and tokens of the engine, so that no clock decides. Seconds."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from orchestrator.errors import EngineOverloaded
from serving.engine.core import answers
from serving.engine.fairness import _KEPT, PATIENCE, FairQueue
from serving.engine.protocol import Backlog, GenerateRequest, Sampling
from serving.engine.scheduler import Limits, Scheduler
from serving.engine.scheduler import Sequence as Request
from serving.replica import PLACES_A_WAITER

PLACES = 16
Shape = tuple[int, int]
"""Tokens of prompt and answer."""


@dataclass
class Seen:
    """What became of one request."""

    tenant: str
    answer: int
    arrived: tuple[int, int]
    """Step, and tokens computed until then."""
    steps: int = 0
    """From arrival to the last token."""
    tokens: int = 0
    """That the engine computed meanwhile, for all: what the steps' time is made of."""
    first: int = 0
    """Steps to the first token."""


@dataclass
class World:
    """A scheduler, and clients who ask again as soon as they are answered."""

    limits: Limits
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)
        self.all: list[Request] = []
        self.seen: dict[Request, Seen] = {}
        self.done: list[Seen] = []
        self.served: defaultdict[str, int] = defaultdict(int)
        self.now = self.computed = 0
        self.again: dict[str, Callable[[], Shape]] = {}

    def ask(self, tenant: str, shape: Shape) -> None:
        prompt, answer = shape
        request = Request([self.chance.randrange(1000) for _ in range(prompt)], tenant=tenant)
        self.all.append(request)
        self.seen[request] = Seen(tenant, answer, (self.now, self.computed))
        self.scheduler.add(request)

    def closed_loop(self, tenant: str, shape: Callable[[], Shape], at_once: int = 1) -> None:
        self.again[tenant] = shape
        for _ in range(at_once):
            self.ask(tenant, shape())

    def step(self) -> None:
        plan = self.scheduler.plan()
        self.now += 1
        self.computed += sum(work.count for work in plan)
        for work in plan:
            chooses, request = work.chooses, work.sequence
            self.scheduler.advance(work)
            self.served[request.tenant] += work.count
            if chooses:
                self._chosen(request)

    def _chosen(self, request: Request) -> None:
        seen = self.seen[request]
        seen.first = seen.first or self.now - seen.arrived[0]
        request.tokens.append(self.chance.randrange(1000))
        if len(request.tokens) - request.prompt < seen.answer:
            return
        seen.steps, seen.tokens = self.now - seen.arrived[0], self.computed - seen.arrived[1]
        self.scheduler.remove(request)
        self.done.append(self.seen.pop(request))
        if seen.tenant in self.again:
            self.ask(seen.tenant, self.again[seen.tenant]())

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    @property
    def useful(self) -> int:
        """Tokens computed, without those computed again after a preemption."""
        return sum(request.charged for request in self.all)

    def of(self, tenant: str) -> list[Seen]:
        return [seen for seen in self.done if seen.tenant == tenant]


def p95(values: Sequence[int]) -> int:
    return sorted(values)[int(0.95 * len(values))]


# --- a flood --------------------------------------------------------------------------------------------------------

FLOODS: dict[str, tuple[Shape, Shape]] = {
    "alike": ((40, 32), (40, 32)),
    "long answers": ((40, 600), (40, 32)),
    "long prompts": ((900, 8), (40, 32)),
    "long both": ((700, 400), (30, 48)),
    "short": ((4, 2), (40, 32)),
}
"""One request of A's and one of B's."""


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("cache", [65_536, 6_144], ids=["roomy", "tight"])
def test_a_flood_leaves_the_others_p95(flood: str, cache: int):
    """B beside 15 tenants with one request each at a time, and B beside one tenant with 500 waiting of the same kind."""
    theirs, mine = FLOODS[flood]
    found = {}
    for kind in ("behaved", "flood"):
        limits = Limits(cache_tokens=cache, block_size=16, max_sequences=PLACES, batch_tokens=128)
        world = World(limits)
        for number in range(PLACES - 1 if kind == "behaved" else 1):
            world.closed_loop(f"a{number}", lambda: theirs, at_once=1 if kind == "behaved" else 500)
        world.run(200)
        world.closed_loop("b", lambda: mine)
        world.run(2200)
        assert len(world.of("b")) >= 15
        found[kind] = world
    for measured in ("steps", "tokens", "first"):
        behaved, flooded = (p95([getattr(s, measured) for s in found[kind].of("b")]) for kind in ("behaved", "flood"))
        assert flooded <= 1.3 * behaved, measured
    assert found["flood"].useful >= 0.9 * found["behaved"].useful, "fairness must not leave places empty"


def test_two_floods_share_by_tokens_not_by_requests():
    world = World(Limits(cache_tokens=65_536, block_size=16, max_sequences=PLACES, batch_tokens=128))
    world.closed_loop("long", lambda: (200, 100), at_once=200)
    world.closed_loop("short", lambda: (10, 8), at_once=200)
    world.run(3000)
    served = {tenant: world.scheduler.waiting.served(tenant) for tenant in ("long", "short")}
    assert served["long"] / served["short"] == pytest.approx(1, abs=0.05)
    assert len(world.of("short")) > 5 * len(world.of("long"))


def test_nobody_alone_is_held_back():
    """One tenant has the whole engine as long as nobody else wants it, and no request of its own overtakes another."""
    world = World(Limits(cache_tokens=65_536, block_size=16, max_sequences=PLACES, batch_tokens=128))
    for _ in range(100):
        world.ask("a", (20, 10))
    order = list(world.seen)
    world.step()
    assert world.scheduler.running == order[: len(world.scheduler.running)]
    world.run(12)
    assert len(world.scheduler.running) == PLACES
    world.run(200)
    assert len(world.done) == 100
    assert world.scheduler.preemptions == 0


def test_having_been_away_earns_nothing():
    """Who was idle all the time that another was served does not get all of it afterwards."""
    world = World(Limits(cache_tokens=65_536, block_size=16, max_sequences=PLACES, batch_tokens=128))
    world.closed_loop("a", lambda: (20, 20), at_once=50)
    world.run(2000)
    before = world.served["a"]
    world.closed_loop("b", lambda: (20, 20), at_once=50)
    world.run(1000)
    assert world.served["b"] == pytest.approx(world.served["a"] - before, rel=0.1)


def test_what_a_preemption_computes_again_is_charged_once():
    limits = Limits(cache_tokens=256, block_size=8, max_sequences=4, batch_tokens=64, share_prefixes=False)
    world = World(limits)
    for _ in range(4):
        world.ask("a", (30, 60))
    world.run(1000)
    assert world.scheduler.preemptions
    assert len(world.done) == 4
    assert world.scheduler.waiting.served("a") == 4 * (30 + 2 * 59)  # the last token of an answer is never computed


# --- the queue ------------------------------------------------------------------------------------------------------


def waiting(queue: FairQueue, *tenants: str) -> list[Request]:
    made = [Request([1], tenant=tenant) for tenant in tenants]
    for request in made:
        queue.add(request)
    return made


def test_the_least_served_is_next_and_a_newcomer_begins_where_the_others_are():
    queue = FairQueue()
    first, _, other = waiting(queue, "a", "a", "b")
    assert queue.first() is first
    queue.take(first)
    queue.charge("a", 10)
    assert queue.first() is other
    queue.charge("b", 20)
    assert (queue.served("a"), queue.served("b")) == (10, 20)
    waiting(queue, "c")
    assert queue.served("c") == 10
    for request in list(queue):
        queue.take(request)
    waiting(queue, "d")  # nobody waits: at whoever had the last turn
    assert queue.served("d") == queue.served("c")


def test_what_lost_its_place_comes_first():
    queue = FairQueue()
    first, second = waiting(queue, "a", "a")
    queue.take(first)
    first.preempted = True
    queue.put_back(first)
    assert (queue.first(), len(queue), queue.new) == (first, 2, 1)
    assert list(queue) == [first, second]


def test_counters_have_an_end():
    queue = FairQueue()
    for number in range(3 * _KEPT):
        (request,) = waiting(queue, f"t{number}")
        queue.take(request)
        queue.charge(request.tenant, 1)
    assert len(queue._served) <= _KEPT + 2


# --- a full queue ---------------------------------------------------------------------------------------------------


def asks(tenant: str, new: int = 3, *, fetched: bool = False) -> GenerateRequest:
    sampling = Sampling(max_tokens=new, ignore_end=True)
    return GenerateRequest((5, 6, 7), None, sampling, tenant=tenant, fetched=fetched)


def test_who_has_most_waiting_gives_way(make_engine):
    core = make_engine(max_sequences=1, max_waiting=4)
    running = asks("a", new=20)
    core.add(running)
    core.step()
    flood = [asks("a") for _ in range(4)]
    assert all(core.add(request) == [] for request in flood)
    with pytest.raises(EngineOverloaded):
        core.add(asks("a"))
    others = [asks("b"), asks("b")]
    gone = [delivery for request in others for delivery in core.add(request)]
    assert [delivery.request_id for delivery in gone] == [flood[3].id, flood[2].id]  # the youngest first
    assert all(isinstance(delivery.error, EngineOverloaded) for delivery in gone)
    for tenant in ("a", "b"):
        with pytest.raises(EngineOverloaded):
            core.add(asks(tenant))
    ended = {delivery.request_id for delivery in answers(core) if delivery.last}
    assert ended == {request.id for request in (running, *flood[:2], *others)}


def test_who_has_waited_for_long_gives_way_to_the_next_of_the_same_tenant(make_engine):
    now = 0.0
    core = make_engine(max_sequences=1, max_waiting=2, clock=lambda: now)
    running, first, second = asks("a", new=20), asks("a"), asks("b")
    core.add(running)
    core.step()
    for request in (first, second):
        assert core.add(request) == []
    now = 0.9 * PATIENCE
    assert core.backlog() == Backlog(0, {"a": 1, "b": 1})
    with pytest.raises(EngineOverloaded):
        core.add(asks("a"))
    now = 1.1 * PATIENCE
    assert core.backlog() == Backlog(0, {"a": 1, "b": 1}, frozenset("ab"))
    with pytest.raises(EngineOverloaded):
        core.add(asks("c"))  # nobody else's place
    third = asks("a")
    (gone,) = core.add(third)
    assert (gone.request_id, type(gone.error)) == (first.id, EngineOverloaded)
    with pytest.raises(EngineOverloaded):
        core.add(asks("a"))  # the third has just come
    ended = {delivery.request_id: delivery.error for delivery in answers(core) if delivery.last}
    assert ended == dict.fromkeys([running.id, second.id, third.id]), "without another one's asking nobody gives way"


def test_what_has_had_its_adapter_loaded_keeps_its_place_and_takes_that_of_one_that_has_not(make_engine):
    now = 0.0
    core = make_engine(max_sequences=1, max_waiting=2, clock=lambda: now)
    running, first, second = asks("a", new=20), asks("a"), asks("a")
    core.add(running)
    core.step()
    for request in (first, second):
        core.add(request)
    third = asks("a", fetched=True)
    assert [delivery.request_id for delivery in core.add(third)] == [second.id]  # the youngest has waited least
    now = 2 * PATIENCE
    fourth = asks("a")
    assert [delivery.request_id for delivery in core.add(fourth)] == [first.id]
    fifth = asks("a", fetched=True)
    assert [delivery.request_id for delivery in core.add(fifth)] == [fourth.id]
    now = 4 * PATIENCE
    assert core.backlog() == Backlog(0, {"a": 2})
    for late in (asks("a"), asks("a", fetched=True)):
        with pytest.raises(EngineOverloaded):
            core.add(late)
    assert [delivery.request_id for delivery in core.add(asks("b"))] == [fifth.id]  # another tenant has its turn
    ended = {delivery.request_id: delivery.error for delivery in answers(core) if delivery.last}
    assert {running.id, third.id} <= ended.keys()


def test_what_was_begun_never_gives_way(make_engine):
    """A request that lost its place to another tenant waits again; it is not counted, and not turned away."""
    core = make_engine(max_sequences=2, max_waiting=1)
    begun = [asks("a", new=30), asks("a", new=30)]  # there is a place for each
    for request in begun:
        core.add(request)
    core.step()
    other = asks("b", new=5)
    core.add(other)
    core.step()
    assert (core.stats().preemptions, core.stats().waiting) == (1, 1)
    last = asks("b")
    assert core.add(last) == []
    with pytest.raises(EngineOverloaded):
        core.add(asks("c"))
    ended = {delivery.request_id: delivery.error for delivery in answers(core) if delivery.last}
    assert ended == dict.fromkeys([*(request.id for request in begun), other.id, last.id])


# --- overload -------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """A clock that goes by the engine's steps."""

    step: int = 0

    def seconds(self) -> float:
        return 0.05 * self.step


def test_ten_times_too_much_is_turned_away_and_the_rest_is_answered_as_in_a_full_batch(make_engine):
    """Offered ten times what the engine can do, counted in steps: what is admitted waits little, and hardly any of it is computed
    twice."""
    places, usual = 8, 24
    waiting = places // PLACES_A_WAITER
    found: dict[str, list[int]] = {}
    for kind, each in (("full", 1), ("overload", 10)):
        clock = Steps()
        core = make_engine(max_sequences=places, max_waiting=waiting, cache_tokens=8192, clock=clock.seconds)
        started: dict[str, int] = {}
        took: list[int] = []
        refused = 0
        chance = random.Random(5)
        while (step := clock.step) < 400:
            # a full batch: who was answered asks again; overload: ten times as many requests as that, whoever was answered
            asking = places - len(started) if kind == "full" else each if step % (usual // places) == 0 else 0
            for _ in range(asking):
                request = asks(f"t{chance.randrange(5)}", new=chance.randrange(usual // 2, 3 * usual // 2))
                try:
                    gone = core.add(request)
                except EngineOverloaded:
                    refused += 1
                    continue
                started[request.id] = step
                for delivery in gone:
                    del started[delivery.request_id]
                    refused += 1
            assert core.stats().waiting <= places + waiting
            clock.step += 1
            took += [clock.step - started.pop(delivery.request_id) for delivery in core.step() if delivery.last]
        found[kind] = took
        if kind == "overload":
            assert core.stats().preemptions < 0.05 * len(took)
            assert refused > 0.85 * (refused + len(took))
            assert len(core._answers) <= places + waiting
    assert len(found["overload"]) >= 0.95 * len(found["full"]), "the batch stays full"
    assert p95(found["overload"]) <= 1.1 * p95(found["full"])
