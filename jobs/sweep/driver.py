"""A sweep's entry point: `python -m jobs.sweep --store URL --run ID --attempt N`. Ray Tune decides, and workers compute."""

from __future__ import annotations

import os
import sys

from jobs import attempt, workers
from jobs.attempt import Attempt
from jobs.sweep import packed_driver, tuning
from orchestrator.runs.result import RunResult


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when the attempt ended as it should (paused included), 1 when it failed; the result says why."""
    return attempt.main("python -m jobs.sweep", _run, arguments)


def _run(ours: Attempt) -> RunResult:
    resolved = ours.resolved()
    tuning.quiet()
    ours.events.emit("state", "The job has started.", state="running")
    return packed_driver.run(ours, resolved, workers.connect(ours, resolved))


def cli() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
