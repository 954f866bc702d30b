"""How many trials fit, and how many of them are fastest together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from jobs.sweep import snapshots
from jobs.sweep.packed import PackedGroup
from jobs.sweep.planning import LANES, Pace, Way, lane_bytes, lanes
from jobs.train.setup import Place
from orchestrator.errors import OutOfMemory
from orchestrator.modeling.decoder import adapter_parameters
from orchestrator.modeling.loading import load_model
from orchestrator.spec.job import JobSpec
from tests.unit.sweep.conftest import check_close, group_of, made_spec, packed

Models = Callable[[str], Path]
RATES = {"learning_rate": {"grid": [1e-3, 1e-2]}}


def job(tuning: dict[str, Any] | None = None, **sweep: Any) -> JobSpec:
    spec = {"name": "one", "base_model": "tiny", "data": {"train": "rows"}, "tuning": tuning or {"type": "lora"}}
    return JobSpec.model_validate(spec | {"sweep": {"search": RATES} | sweep})


# --- memory


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 16), (torch.bfloat16, 20)])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_a_lane_takes_what_its_adapter_and_its_optimizer_take(
    tiny_model: Models, rows: Any, dtype: torch.dtype, each: int, targets: Any
) -> None:
    directory = tiny_model("llama")
    spec = made_spec(tuning__rank=5, tuning__targets=targets, train__dtype=str(dtype).removeprefix("torch."))
    group = group_of(directory, rows, dtype=dtype)
    group.open("a", spec)
    (lane,) = group._lanes
    parameters = sum(one.numel() for one in adapter_parameters(group._network, lane.slot).values())
    assert lane_bytes(load_model(directory, dtype=dtype), spec.tuning) == each * parameters  # type: ignore[arg-type]


def test_as_many_as_fit(tiny_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    network, spec = load_model(tiny_model("llama")), job()
    each = lane_bytes(network, spec.tuning)  # type: ignore[arg-type]

    def free(trials: float) -> None:
        available = int(3 * trials * each) + 3
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    free(3)
    assert lanes(spec, network, Place()) == 3
    assert lanes(job(max_concurrent=2), network, Place()) == 2
    with pytest.raises(OutOfMemory) as caught:
        lanes(job(max_concurrent=4), network, Place())
    assert "sweep.max_concurrent: 4, and there is memory for 3" in caught.value.message
    assert caught.value.hint == "Set sweep.max_concurrent to 3 or less."
    free(100)
    assert lanes(spec, network, Place()) == LANES
    free(0.5)
    with pytest.raises(OutOfMemory, match="memory for 0") as caught:
        lanes(spec, network, Place())
    assert "Lower the ranks" in str(caught.value.hint)


def test_the_largest_rank_that_is_searched_decides(tiny_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_model(tiny_model("llama"))
    search = RATES | {"rank": {"choice": [4, 64]}, "targets": {"choice": [["q_proj"], "all-linear"]}}
    wide = job({"type": "lora", "rank": 64}).tuning
    available = int(3 * 2.5 * lane_bytes(network, wide))  # type: ignore[arg-type]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    narrow = {"type": "lora", "rank": 4, "targets": ["q_proj"]}
    assert lanes(job(narrow, search=search), network, Place()) == 2
    assert lanes(job(narrow), network, Place()) == LANES


# --- speed


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps(
    pace: Pace, clock: Clock, count: int, speeds: dict[tuple[int, int], float], *, open_lanes: int, fit: int = 64
) -> list[tuple[int, int]]:
    """Which way was taken at each step, where the ways make so many tokens a second."""
    taken = []
    for _ in range(count):
        way = pace.way(open_lanes)
        most = min(way.together, fit)
        with pace.step(way) as passes:
            passes += [(most, 100 * most)] * (open_lanes // most)
            clock.now += 100 * most * (open_lanes // most) / speeds[most, way.beside]
        taken.append((most, way.beside))
    return taken


def test_more_are_tried_together_as_long_as_it_gains() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    found = steps(pace, clock, 10, {(1, 1): 500.0, (2, 1): 650.0, (4, 1): 600.0}, open_lanes=8)
    assert found == [(n, 1) for n in (1, 1, 1, 2, 2, 4, 4, 2, 2, 2)], "the first step of all does not count"
    assert pace.why.endswith("measured 500 tokens/s one by one, 650 tokens/s 2 together, 600 tokens/s 4 together")


def test_passes_are_tried_beside_each_other_on_as_many_cores_as_there_are() -> None:
    clock = Clock()
    pace = Pace(cores=4, clock=clock)
    speeds = {(1, 1): 500.0, (1, 2): 600.0, (1, 4): 700.0, (2, 4): 650.0}
    found = steps(pace, clock, 12, speeds, open_lanes=8)
    assert found == [(1, 1)] * 3 + [(1, 2)] * 2 + [(1, 4)] * 2 + [(2, 4)] * 2 + [(1, 4)] * 3
    assert "600 tokens/s 2 beside each other, 700 tokens/s 4 beside each other" in pace.why
    assert pace.why.endswith("650 tokens/s 2 together, 4 beside each other")
    assert Pace(cores=4, clock=clock).way(1) == Way(), "nothing can be beside a single lane"


def test_a_pass_that_is_full_is_not_made_longer() -> None:
    clock = Clock()
    pace = Pace(full=200, clock=clock)
    found = steps(pace, clock, 9, {(1, 1): 500.0, (2, 1): 650.0}, open_lanes=8)
    assert found == [(1, 1)] * 3 + [(2, 1)] * 6, "passes of 100 tokens gain from more, and of 200 they do not"


def test_one_step_that_takes_long_is_enough() -> None:
    clock = Clock()
    found = steps(Pace(clock=clock), clock, 5, {(1, 1): 1.0, (2, 1): 2.0, (4, 1): 1.5}, open_lanes=4)
    assert found == [(1, 1), (1, 1), (2, 1), (4, 1), (2, 1)]


def test_what_does_not_fit_into_a_pass_is_not_tried_further() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    found = steps(pace, clock, 9, {(1, 1): 500.0, (2, 1): 650.0}, open_lanes=8, fit=2)
    assert found == [(n, 1) for n in (1, 1, 1, 2, 2, 2, 2, 2, 2)]
    assert sorted(pace.seen) == [(1, 1), (2, 1), (4, 1)], "8 is not tried where there was no room for 4"
    assert pace.why.endswith("measured 500 tokens/s one by one, 650 tokens/s 2 together")


def test_a_step_without_room_for_two_says_nothing_of_the_next() -> None:
    clock = Clock()
    pace, speeds = Pace(clock=clock), {(1, 1): 500.0, (2, 1): 650.0}
    assert steps(pace, clock, 3, speeds, open_lanes=8) == [(1, 1)] * 3
    assert steps(pace, clock, 1, speeds, open_lanes=8, fit=1) == [(1, 1)]
    assert steps(pace, clock, 4, speeds, open_lanes=8, fit=2) == [(2, 1)] * 4


def test_more_are_tried_when_more_have_come() -> None:
    clock = Clock()
    pace, speeds = Pace(clock=clock), {(1, 1): 500.0, (2, 1): 650.0, (4, 1): 900.0}
    assert steps(pace, clock, 4, speeds, open_lanes=1) == [(1, 1)] * 4
    assert steps(pace, clock, 5, speeds, open_lanes=4) == [(n, 1) for n in (2, 2, 4, 4, 4)]
    assert steps(pace, clock, 1, speeds, open_lanes=2) == [(2, 1)], "no more than there are"


def test_what_goes_together_changes_nothing_but_speed(tiny_model: Models, rows: Any, tmp_path: Path) -> None:
    directory = tiny_model("llama")
    specs = {f"t{n}": made_spec(train__seed=n, train__epochs=3) for n in range(4)}

    def group() -> PackedGroup:
        made = group_of(directory, rows)
        made.pace = Pace(cores=2)
        return made

    paced = group()
    found, expected = packed(paced, specs), packed(group_of(directory, rows), specs)
    for trial in specs:
        check_close(found[trial], expected[trial])
    assert paced.pace is not None
    assert {(1, 1), (2, 1)} <= set(paced.pace.seen)
    assert any(way.beside == 2 for way in paced.pace.seen)
    snapshots.write(tmp_path, paced.snapshot())
    again = group()
    assert again.restore(tmp_path)
    assert again.pace is not None
    assert again.pace.seen == paced.pace.seen
