"""What Serve is told of deployments, with GPUs and without. Under a second, Ray's import aside."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig

from orchestrator.commands.serving import parse_replicas
from orchestrator.errors import UsageError
from serving.engine.choice import OwnEngine, VllmChoice
from serving.plan import Plan, Replicas, ServedModel
from serving.scaling import actor_options, engine_scaling, gateway_scaling, reserved_gpus

PLAN = Plan(models=(ServedModel(name="base", reference="base"),), threads=3)


@pytest.mark.parametrize(
    ("text", "least", "most"), [("1", 1, 1), ("2", 2, 2), ("1:4", 1, 4), ("0:2", 0, 2), ("3:3", 3, 3)]
)
def test_what_a_person_writes_is_what_the_plan_takes(text: str, least: int, most: int):
    assert Replicas.model_validate(parse_replicas(text)) == Replicas(min=least, max=most)


@pytest.mark.parametrize("text", ["0", "-1", "4:1", "0:0", "", ":", "1:", ":2", "two", "1:2:3", "1.5"])
def test_what_is_no_number_of_replicas_is_refused_before_anything_starts(text: str):
    with pytest.raises(UsageError, match="no number of replicas"):
        parse_replicas(text)


@pytest.mark.parametrize("given", [{"min": 2, "max": 1}, {"min": 0, "max": 0}, {"min": -1, "max": 1}, {"most": 2}])
def test_a_plan_that_cannot_be_is_refused(given: dict[str, int]):
    with pytest.raises(ValidationError):
        Replicas.model_validate(given)


def test_a_fixed_number_is_not_scaled():
    options = engine_scaling(PLAN, Replicas(min=2, max=2), 0)
    assert options["num_replicas"] == 2
    assert "autoscaling_config" not in options


def test_a_range_is_and_starts_at_least_one_so_that_what_cannot_be_served_fails_at_once():
    scaled = engine_scaling(PLAN, Replicas(min=1, max=4), 0)
    config = scaled["autoscaling_config"]
    assert isinstance(config, AutoscalingConfig)
    assert "num_replicas" not in scaled
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, None, 4)
    sleeping = engine_scaling(PLAN, Replicas(min=0, max=2), 0)["autoscaling_config"]
    assert (sleeping.min_replicas, sleeping.initial_replicas) == (0, 1)
    assert sleeping.downscale_to_zero_delay_s == PLAN.idle_seconds


def test_figures_come_sooner_than_they_are_acted_upon():
    config = engine_scaling(PLAN, Replicas(min=1, max=4), 0)["autoscaling_config"]
    assert config.metrics_interval_s < config.look_back_period_s < config.upscale_delay_s < config.downscale_delay_s


def test_new_replicas_start_before_old_ones_go_but_where_that_would_take_a_gpu_that_may_not_exist():
    assert engine_scaling(PLAN, Replicas(), 0)["max_surge_percent"] > 0
    assert engine_scaling(PLAN, Replicas(), 1)["max_surge_percent"] == 0
    assert gateway_scaling(1)["max_surge_percent"] > 0


def test_an_engine_on_a_gpu_asks_for_one_and_none_ever_for_a_cpu():
    for gpus in (0, 1):
        options = actor_options(PLAN, gpus, {})
        assert (options["num_cpus"], options["num_gpus"]) == (0, gpus)


@pytest.mark.parametrize(
    ("gpus", "own", "vllm"),
    [([0], 0, 0), ([1], 0, 1), ([2], 1, 1), ([1, 0], 1, 1), ([0, 1], 1, 1), ([1, 1], 1, 1)],
    ids=["none", "the only one of the only machine", "two", "on the head", "on another", "on each"],
)
def test_a_gpu_is_reserved_where_a_job_can_have_another(gpus: list[int], own: int, vllm: int):
    nodes = [{"CPU": 8.0} | ({"GPU": float(n)} if n else {}) for n in gpus]
    assert (reserved_gpus(nodes, OwnEngine()), reserved_gpus(nodes, VllmChoice(python="/p"))) == (own, vllm)


def test_an_engine_has_its_threads_and_the_environment_of_who_deploys():
    inherited = {"ADAPTORY_HOME": "/home"}
    environment = actor_options(PLAN, 0, inherited)["runtime_env"]["env_vars"]
    assert {"OMP_NUM_THREADS": "3", "ADAPTORY_HOME": "/home"}.items() <= environment.items()
    free = Plan(models=())
    assert actor_options(free, 0, {})["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == str(os.cpu_count())
