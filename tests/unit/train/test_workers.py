"""What Ray Train is asked to start."""

from __future__ import annotations

import pytest

from cluster.resources import WorkerShape
from jobs.train.setup import Place
from jobs.workers import _settled, _trainer_class
from orchestrator.modeling import dtypes
from orchestrator.spec.job import JobSpec
from orchestrator.spec.resolved import ResolvedSpec


@pytest.mark.parametrize("workers", [1, 2])
def test_a_group_starts_no_process_that_it_has_no_use_for(workers: int) -> None:
    """Fails when Ray names them otherwise, too."""
    ours = _trainer_class(WorkerShape(workers, 0, 1))

    def started(trainer: type) -> set[str]:
        return {type(one).__name__ for one in trainer(lambda: None)._create_default_callbacks()}  # type: ignore[attr-defined]

    assert started(ours.__base__) - started(ours) == {"DatasetsCallback"}


@pytest.mark.parametrize(
    ("asked", "cpu_can", "used"),
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float32"),
        ("float32", True, "float32"),
        ("bfloat16", False, "bfloat16"),
    ],
)
def test_workers_compute_in_what_rank_0_is_best_at(
    monkeypatch: pytest.MonkeyPatch, asked: str, cpu_can: bool, used: str
) -> None:
    monkeypatch.setattr(dtypes, "_cpu_multiplies_bf16", lambda: cpu_can)
    spec = JobSpec.model_validate({"name": "n", "base_model": "b", "data": {"train": "t"}, "train": {"dtype": asked}})
    resolved = ResolvedSpec.model_construct(spec=spec)
    assert _settled(resolved, Place()).spec.train.dtype == used
    assert resolved.spec.train.dtype == asked
