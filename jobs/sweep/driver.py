"""A sweep's entry point: `python -m jobs.sweep --store URL --run ID --attempt N`. Ray Tune decides, and workers compute."""

from __future__ import annotations

import os
import sys

from cluster.resources import WorkerShape, cluster_resources
from jobs import attempt, workers
from jobs.attempt import Attempt
from jobs.sweep import experiment, packed_driver, placement, separate, tuning
from jobs.sweep.placement import Placement
from orchestrator.runs.result import RunResult
from orchestrator.spec.resolved import ResolvedSpec
from orchestrator.store import alone_path


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when the attempt ended as it should (paused included), 1 when it failed; the result says why."""
    return attempt.main("python -m jobs.sweep", _run, arguments)


def _run(ours: Attempt) -> RunResult:
    resolved = ours.resolved()
    tuning.quiet()
    ours.events.emit("state", "The job has started.", state="running")
    shape = workers.connect(ours, resolved)
    placed = _placed(ours, resolved, shape)
    if placed.name == "packed":
        result = packed_driver.run(ours, resolved, shape)
        if (why := packed_driver.why_alone(result)) is None:
            return result
        placed = _parted(ours, resolved, shape, why)
    return separate.run(ours, resolved, shape, placed)


def _placed(ours: Attempt, resolved: ResolvedSpec, shape: WorkerShape) -> Placement:
    """How the trials are placed, as every attempt has it; it is said."""
    known = ours.store.read_json(alone_path(ours.run)) if ours.store.exists(alone_path(ours.run)) else {}
    placed = placement.choose(resolved.spec, shape, cluster_resources(), known.get("why"))
    ours.events.emit("sweep", plan={"placement": placed.name, "why": placed.why})
    return placed


def _parted(ours: Attempt, resolved: ResolvedSpec, shape: WorkerShape, why: str) -> Placement:
    """The trials cannot be packed after all: from now on they are not, and Tune begins again."""
    ours.store.write_json(alone_path(ours.run), {"why": why})
    experiment.forget(ours)
    return _placed(ours, resolved, shape)


def cli() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
