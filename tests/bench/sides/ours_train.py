"""Our training loop over given token rows; prints one JSON line.

`python ours_train.py --model DIR --rows ROWS.jsonl --steps N`. Each line of ROWS.jsonl is `{"input_ids": [...], "labels": [...]}`.
It is `jobs.train.loop` as a run takes it, without Ray, store and checkpoints around it, on rows in the given order.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jobs.train.batches import Batches
from jobs.train.engines import SingleEngine
from jobs.train.loop import SLOT, Hooks, train
from jobs.train.packing import pack
from jobs.train.setup import Place, micro_batch_tokens, use_threads
from jobs.train.steps import Progress
from orchestrator.modeling.decoder import adapter_parameters, add_adapter
from orchestrator.modeling.dtypes import DTYPES
from orchestrator.modeling.loading import load_model
from orchestrator.modeling.lora import LoraShape
from orchestrator.spec.job import LoraTuning, TrainSpec


class Tokens(NamedTuple):
    ids: np.ndarray
    """int32 [tokens]"""
    loss_mask: np.ndarray
    """bool [tokens]"""


class Rows:
    """Token rows from a file, as `jobs.train.packing.Rows`."""

    def __init__(self, path: Path):
        read = [json.loads(line) for line in path.read_text().splitlines()]
        self._rows = [
            Tokens(np.array(row["input_ids"], np.int32), np.array([label != -100 for label in row["labels"]]))
            for row in read
        ]
        self.lengths = np.array([len(row.ids) for row in self._rows])
        self.labelled = np.array([int(row.loss_mask[1:].sum()) for row in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Tokens:
        return self._rows[row]


class InOrder(Batches):
    """Steps over the rows as they stand in the file, so that the other side can see the same ones."""

    def rows(self, step: int) -> list[int]:
        return list(range(step * self.batch_size, min((step + 1) * self.batch_size, len(self._lengths))))


@dataclass
class Steps:
    """When each step ended, and what it had seen by then."""

    ends: list[tuple[float, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __call__(self, progress: Progress) -> None:
        self.ends.append((time.perf_counter(), progress.tokens))
        self.losses.append(progress.loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps, the warm-up ones included")
    parser.add_argument("--warmup-steps", type=int, default=1, help="steps left out of the time")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per optimiser step")
    parser.add_argument("--micro-batch-tokens", type=int, help="default: what a run takes")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()

    rows = Rows(options.rows)
    spec = TrainSpec(learning_rate=options.learning_rate, schedule="constant", warmup=0.0, dtype=options.dtype)
    use_threads(options.threads)
    model = load_model(options.model, dtype=DTYPES[options.dtype])
    tokens = options.micro_batch_tokens or micro_batch_tokens(spec, model, Place(), int(rows.lengths.max()))
    batches = InOrder(
        rows.lengths,
        batch_size=options.batch_size,
        epochs=1,
        seed=0,
        max_steps=options.steps,
        micro_batch_tokens=tokens,
    )
    tuning = LoraTuning(rank=options.rank, alpha=2 * options.rank)
    add_adapter(model, SLOT, LoraShape(tuning.rank, tuning.alpha), seed=0)
    engine, steps = SingleEngine(adapter_parameters(model, SLOT), spec), Steps()
    train(
        model,
        engine,
        rows,
        batches,
        lambda step: spec.learning_rate,
        seed=0,
        progress=Progress(step=0, total_steps=batches.total_steps),
        hooks=Hooks(on_step=steps),
    )
    (began, before), (ended, tokens) = steps.ends[options.warmup_steps - 1], steps.ends[-1]
    timed = range(options.warmup_steps, batches.total_steps)
    packed = [pack(rows, micro, 1, share=True) for step in timed for micro in batches.micro_batches(step, 0)]
    shapes = [[len(batch.ids), len(batch.at)] for batch in packed]
    print(
        json.dumps(
            {
                "tokens_per_second": (tokens - before) / (ended - began),
                "tokens": tokens,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "losses": steps.losses,
                "computed_tokens_per_second": sum(tokens for tokens, _ in shapes) / (ended - began),
                "micro_batches": shapes,
            }
        )
    )


if __name__ == "__main__":
    main()
