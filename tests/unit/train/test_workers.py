"""What Ray Train is asked to start."""

from __future__ import annotations

import pytest

from cluster.resources import WorkerShape
from jobs.workers import _trainer_class


@pytest.mark.parametrize("workers", [1, 2])
def test_a_group_has_no_manager_of_datasets(workers: int) -> None:
    """Fails when Ray names it otherwise, too."""
    ours = _trainer_class(WorkerShape(workers, 0, 1))

    def started(trainer: type) -> set[str]:
        return {type(one).__name__ for one in trainer(lambda: None)._create_default_callbacks()}  # type: ignore[attr-defined]

    assert started(ours.__base__) - started(ours) == {"DatasetsCallback"}
