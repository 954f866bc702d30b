"""A fine-tune's entry point: `python -m jobs.train --store URL --run ID --attempt N`. Starts the workers and waits for them."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from jobs import attempt, workers
from orchestrator.runs.result import RunResult


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when the attempt ended as it should (paused included), 1 when it failed; the result says why."""
    return attempt.main("python -m jobs.train", _run, arguments)


def _run(ours: attempt.Attempt) -> RunResult:
    resolved = ours.resolved()
    ours.events.emit("state", "The job has started.", state="running")
    shape = workers.connect(ours, resolved)
    ours.events.emit("phase", phase="waiting for workers")
    return workers.Workers(ours, resolved, shape, _worker).run()


def _worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """On each worker; what it returns is a result that the store did not take."""
    began = time.time()
    workers.give_way(config)
    from jobs.train.worker import run_worker

    with workers.entered(config, began) as session:
        result = run_worker(session)
    return workers.handed_in(session, result)


def cli() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
