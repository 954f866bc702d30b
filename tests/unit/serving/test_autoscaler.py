"""When engines are added and when they go, with Serve's own bounds and delays around the policy. Under a second, Ray's import aside."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingContext

from serving.autoscaler import FULL, ByLoad, told
from serving.engine.protocol import EngineStats
from serving.plan import Plan, Replicas
from serving.scaling import DOWN_SECONDS, UP_SECONDS, engine_scaling

BATCH, UNREAD, CACHE = 32, 8192, 100_000


def stats(**given: Any) -> EngineStats:
    fields = dict.fromkeys(("running", "waiting", "cache_tokens_used", "prompt_tokens", "shared_tokens"), 0)
    fields |= dict.fromkeys(("completion_tokens", "preemptions", "steps", "failed_steps"), 0)
    return EngineStats(**fields | {"adapters": (), "cache_tokens": CACHE, "step_seconds": 0.0} | given)


class Deployment:
    """One that is scaled by Serve's rules on a clock of the test's own; replicas start at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, replicas: Replicas, running: int, idle_seconds: float = 300.0):
        plan = Plan(models=(), max_sequences=BATCH, idle_seconds=idle_seconds)
        self.config = engine_scaling(plan, replicas, 0)["autoscaling_config"]
        self.policy = _apply_autoscaling_config(self.config.policy.get_policy()(**self.config.policy.policy_kwargs))
        self.running, self.now, self.state = running, 1000.0, {}
        monkeypatch.setattr("ray.serve.autoscaling_policy.time", SimpleNamespace(time=lambda: self.now))

    def passes(self, seconds: float, requests: float = 0, *engines: EngineStats) -> int:
        """Replicas after so long a time of this load."""
        for _ in range(int(seconds * 2) + 1):
            self._look(requests, engines)
            self.now += 0.5
        return self.running

    def _look(self, requests: float, engines: tuple[EngineStats, ...]) -> None:
        names = [f"r{number}" for number in range(self.running)]
        shown = [told(asdict(each)) for each in engines] or [told(asdict(stats()))] * self.running
        metrics = {key: dict(zip(names, (one[key] for one in shown), strict=False)) for key in told(asdict(stats()))}
        context = AutoscalingContext(
            deployment_id=None,
            deployment_name="engine",
            app_name="adaptory",
            current_num_replicas=self.running,
            target_num_replicas=self.running,
            running_replicas=names,
            total_num_requests=requests,
            total_queued_requests=0.0,
            aggregated_metrics=metrics,
            raw_metrics={},
            capacity_adjusted_min_replicas=self.config.min_replicas,
            capacity_adjusted_max_replicas=self.config.max_replicas,
            policy_state=self.state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now,
            config=self.config,
        )
        wanted, self.state = self.policy(context)
        self.running = max(self.config.min_replicas, min(self.config.max_replicas, wanted))


def test_a_full_batch_has_another_engine_started_after_a_while(monkeypatch):
    deployment = Deployment(monkeypatch, Replicas(min=1, max=4), 1)
    assert deployment.passes(3 * UP_SECONDS, FULL * BATCH) == 1
    assert deployment.passes(UP_SECONDS - 1, FULL * BATCH + 1) == 1
    assert deployment.passes(2, FULL * BATCH + 1) == 2


def test_a_burst_that_is_over_sooner_starts_none(monkeypatch):
    deployment = Deployment(monkeypatch, Replicas(min=1, max=4), 1)
    for _ in range(5):
        assert deployment.passes(UP_SECONDS / 2, 3 * BATCH) == 1
        assert deployment.passes(1, 1) == 1


def test_few_requests_with_many_tokens_do_so_as_well(monkeypatch):
    unread = Deployment(monkeypatch, Replicas(min=1, max=4), 1)
    assert unread.passes(2 * UP_SECONDS, 4, stats(waiting=3, waiting_tokens=UNREAD + 1)) == 2
    full = Deployment(monkeypatch, Replicas(min=1, max=4), 1)
    assert full.passes(2 * UP_SECONDS, 4, stats(running=4, cache_tokens_used=int(FULL * CACHE) + 1)) == 2
    roomy = Deployment(monkeypatch, Replicas(min=1, max=4), 1)
    assert roomy.passes(2 * UP_SECONDS, 4, stats(running=4, cache_tokens_used=CACHE // 2, waiting_tokens=100)) == 1


def test_there_are_never_more_than_asked_for(monkeypatch):
    assert Deployment(monkeypatch, Replicas(min=1, max=3), 1).passes(60, 100 * BATCH) == 3


def test_engines_go_one_delay_after_they_are_not_needed_and_not_if_the_rest_would_be_full(monkeypatch):
    deployment = Deployment(monkeypatch, Replicas(min=1, max=4), 3)
    just = 2 * FULL * BATCH
    assert deployment.passes(3 * DOWN_SECONDS, just) == 3  # two would do, and be full
    assert deployment.passes(DOWN_SECONDS - 2, just / 1.2) == 3
    assert deployment.passes(4, just / 1.2) == 2
    assert deployment.passes(2 * DOWN_SECONDS, 0) == 1
    assert deployment.passes(1000, 0) == 1


def test_the_last_one_goes_when_idle_only_if_none_may_be(monkeypatch):
    deployment = Deployment(monkeypatch, Replicas(min=0, max=2), 2, idle_seconds=400)
    assert deployment.passes(DOWN_SECONDS + 2, 0) == 1
    assert deployment.passes(390, 0) == 1
    assert deployment.passes(1000, 0.01) == 1  # somebody asks now and then
    assert deployment.passes(402, 0) == 0
    assert deployment.passes(1000, 0) == 0
    assert deployment.passes(0, 1) == 1  # at once


def test_an_engine_that_says_nothing_of_its_cache_is_scaled_by_requests(monkeypatch):
    policy = ByLoad(BATCH, UNREAD)
    assert policy.need(FULL * BATCH, {}) == pytest.approx(1)
    assert policy.need(0, {"cache_tokens": [0.0], "cache_tokens_used": [0.0], "unread": [0.0]}) == 0
