"""A packed group of so many trials, without Ray around it: two steps, their speed and what memory they took. Prints one JSON line.

`python packed_lanes.py --case CASE.json --lanes 8`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

from ours_train import Rows

from jobs.sweep.packed import PackedGroup
from jobs.sweep.planning import FULL, Pace
from jobs.sweep.worker import TOKENS_AT_ONCE
from jobs.train.setup import Place, use_threads
from orchestrator.modeling.dtypes import DTYPES
from orchestrator.modeling.loading import load_model
from orchestrator.spec.job import JobSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--lanes", type=int, required=True)
    parser.add_argument("--steps", type=int, default=2, help="timed, after one that is not")
    options = parser.parse_args()
    case = json.loads(options.case.read_text())
    use_threads(os.cpu_count() or 1)
    longest = [trial for trial in case["trials"] if trial["epochs"] == case["longest"]]
    group = PackedGroup(
        load_model(Path(case["model"]), dtype=DTYPES[case["dtype"]]),
        Rows(Path(case["rows"])),
        None,
        Place(),
        tokens_at_once=TOKENS_AT_ONCE["cpu"],
        lanes=options.lanes,
        pace=Pace(os.cpu_count() or 1, FULL["cpu"]),
    )
    for number in range(options.lanes):
        group.open(str(number), JobSpec.model_validate(longest[number % len(longest)]["spec"]))
    assert group.pace is not None
    group.step()
    while group.pace.way(options.lanes) not in group.pace.seen:
        group.step()  # which way is fastest is tried first
    began, before = time.perf_counter(), group.computed.tokens
    for _ in range(options.steps):
        group.step()
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "why": group.pace.why,
                "tokens_per_second": (group.computed.tokens - before) / seconds,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
