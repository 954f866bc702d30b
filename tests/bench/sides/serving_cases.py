"""The batches that every side of serve_vs_peers answers, and how their time is taken."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

Batch = list[tuple[list[int], str | None]]
"""Prompt and directory of its adapter, of each request."""


def options(description: str | None, **flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True, help="directory of PEFT directories")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: token ids of each prompt")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    for name, explanation in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=explanation)
    return parser.parse_args()


def timed(
    chosen: argparse.Namespace, cases: tuple[str, ...], answer: Callable[[Batch], list[list[int]]]
) -> dict[str, object]:
    """One batch to warm up, then the others on the clock.

    Args:
        cases: of `mixed` (the adapters in turn), `base` (no adapter) and `one` (a single request without).

    Returns:
        What a side prints: median tokens a second of each case, and the answers to the mixed case's first batch.
    """
    prompts = json.loads(chosen.prompts.read_text())
    adapters = sorted(str(path.parent) for path in chosen.adapters.glob("*/adapter_config.json"))
    speeds, answers = {}, None
    for case in cases:
        seconds = []
        for repeat in range(chosen.repeats + 1):
            cut = prompts[repeat * chosen.requests :][: 1 if case == "one" else chosen.requests]
            batch = [(p, adapters[n % len(adapters)] if case == "mixed" else None) for n, p in enumerate(cut)]
            start = time.perf_counter()
            found = answer(batch)
            seconds.append(time.perf_counter() - start)
            assert all(len(tokens) == chosen.new_tokens for tokens in found), [len(tokens) for tokens in found]
            if case == "mixed" and answers is None:
                answers = found
        speeds[case] = len(batch) * chosen.new_tokens / statistics.median(seconds[1:])
    return {"tokens_per_second": speeds} | ({"answers": answers} if answers else {})
