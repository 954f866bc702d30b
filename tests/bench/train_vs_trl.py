"""Training speed against TRL's SFTTrainer with PEFT at its best: same rows, model, rank, global batch, steps, optimiser.

Every measurement is a process of its own that reports real tokens a second without start-up and warm-up steps. TRL is first
tried briefly in each of its modes, the best three again for longer; then the best runs against ours, one after the other, several
times over, with the unavoidable matmuls timed beside each pair, so that a noisy machine is noisy for all. The last
line is `train_vs_trl ratio=… ours=… trl=… matmul_share=… memory_ours_mb=… memory_trl_mb=…` (medians over the pairs).

About 20 minutes on two idle cores, once the model (90 MB), the data (46 MB) and TRL's environment are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from sides.running import BUILD, SIDES, Result, environment, measure

TRIAL_SECONDS = 150
"""A mode that needs longer for a warm-up step and a timed one is no candidate: the fastest need half a minute."""
LOSS_TOLERANCE = 0.05
"""Of the first step, before any update: both sides compute it in bf16, in another order."""

MODES: list[Result] = [
    *({"mode": "pad", "micro-batch": size} for size in (1, 2, 4, 8, 16)),
    *({"mode": "grouped", "micro-batch": size} for size in (2, 4, 8, 16)),
    *({"mode": "padding-free", "micro-batch": size} for size in (2, 4, 8, 16)),
    *({"mode": "packed", "micro-batch": 1, "pack-length": length} for length in (512, 1024, 1536)),
]
VARIANTS: list[Result] = [{}, {"attention": "eager"}, {"autocast": True}]
"""Tried on the best modes: another attention, bf16 autocast instead of plain bf16 weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed optimiser steps of a paired run")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--model", type=Path, help="directory of the base model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--trl", help="Python with TRL installed; default: an environment is made in build/")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    model = options.model or base_model()
    rows = BUILD / "rows.jsonl"
    write_rows(model, rows, 16 * (1 + max(options.steps, 4)))
    trl_python = options.trl or environment("trl", SIDES / "trl-requirements.txt")

    common = {"model": model, "rows": rows, "batch-size": 16, "rank": 8, "learning-rate": 1e-3}
    steps = {"steps": options.steps + 1}
    best, unpadded = best_of_trl(trl_python, common)
    ours, trl, floors = [], [], []
    for pair in range(options.pairs):
        ours.append(measure(sys.executable, "ours_train.py", common | steps))
        trl.append(measure(trl_python, "trl_train.py", common | steps | best))
        floors.append(
            measure(sys.executable, "matmul_floor.py", {"model": model, "micro-batches": ours[-1]["micro_batches"]})
        )
        print(f"pair {pair + 1}: ours {ours[-1]['tokens_per_second']:.1f}, TRL {trl[-1]['tokens_per_second']:.1f}, "
              f"matmuls alone {floors[-1]['tokens_per_second']:.0f} real tokens/s", flush=True)  # fmt: skip

    compare_losses(ours[0]["losses"], unpadded["losses"])
    print(f"losses, ours: {shown(ours[0]['losses'])}\nlosses, TRL ({name(best)}): {shown(trl[0]['losses'])}")
    report(ours, trl, floors)


def report(ours: list[Result], trl: list[Result], floors: list[Result]) -> None:
    """The last line: medians of the ratios within each pair, not a ratio of medians."""
    speed = [side["tokens_per_second"] for side in ours]
    ratio = statistics.median(a / b["tokens_per_second"] for a, b in zip(speed, trl, strict=True))
    share = statistics.median(
        a["computed_tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, floors, strict=True)
    )
    print(
        f"train_vs_trl ratio={ratio:.2f} ours={statistics.median(speed):.1f} "
        f"trl={statistics.median(side['tokens_per_second'] for side in trl):.1f} matmul_share={share:.2f} "
        f"memory_ours_mb={max(side['peak_rss_mb'] for side in ours):.0f} "
        f"memory_trl_mb={max(side['peak_rss_mb'] for side in trl):.0f}"
    )


def best_of_trl(python: str, common: Result) -> tuple[Result, Result]:
    """TRL's fastest mode on this machine, and the result of the plain padded mode with the same rows in the same order."""
    print("TRL + PEFT, real tokens/s of each mode (one timed step):", flush=True)
    short = [(mode, tried(python, common | {"steps": 2} | mode)) for mode in MODES]
    finalists = sorted((item for item in short if item[1]), key=speed_of, reverse=True)[:3]
    if not finalists:
        raise SystemExit("TRL ran in none of its modes; see the messages above.")
    print("the best three for longer, and variants of the first (three timed steps):", flush=True)
    candidates = [mode | variant for mode, _ in finalists[:1] for variant in VARIANTS] + [
        mode for mode, _ in finalists[1:]
    ]
    longer = [(mode, tried(python, common | {"steps": 4} | mode)) for mode in candidates]
    best, _ = max((item for item in longer if item[1]), key=speed_of)
    print(f"TRL at its best: {name(best)}", flush=True)
    padded = next((result for mode, result in short if mode["mode"] == "pad" and result), None)
    if padded is None:
        raise SystemExit("TRL ran in no padded mode, so there is no loss to compare with.")
    return best, padded


def speed_of(item: tuple[Result, Result | None]) -> float:
    return item[1]["tokens_per_second"] if item[1] else 0.0


def tried(python: str, options: Result) -> Result | None:
    """The result of one mode, printed; None where TRL refuses it, runs out of memory, or is far from the fastest."""
    mode = {
        key: value
        for key, value in options.items()
        if key in ("mode", "micro-batch", "pack-length", "attention", "autocast")
    }
    try:
        result = measure(python, "trl_train.py", options, patience=TRIAL_SECONDS)
    except RuntimeError as error:
        print(f"  {name(mode):48} does not run: {str(error).strip().splitlines()[-1][:120]}", flush=True)
        return None
    print(f"  {name(mode):48} {result['tokens_per_second']:7.1f}  {result['peak_rss_mb']:6.0f} MB", flush=True)
    return result


def name(mode: Result) -> str:
    return " ".join(key if value is True else f"{key}={value}" for key, value in mode.items()).removeprefix("mode=")


def shown(losses: list[float]) -> str:
    return " ".join(f"{loss:.3f}" for loss in losses)


def compare_losses(ours: list[float], trl: list[float]) -> None:
    """The first step of both sides sees the same rows with untrained adapters: another loss means another task."""
    if abs(ours[0] - trl[0]) > LOSS_TOLERANCE:
        raise SystemExit(
            f"The first loss differs (ours {ours[0]:.4f}, TRL {trl[0]:.4f}): they do not train on the same tokens."
        )


# --- set-up ---------------------------------------------------------------------------------------------------------


def base_model() -> Path:
    from orchestrator.modeling.base_model import materialize
    from orchestrator.settings import load_settings

    return materialize("smollm2-135m-instruct", cache=load_settings().cache, say=print).path


def write_rows(model: Path, target: Path, count: int) -> None:
    """The first training rows of `example:finance-entities`, rendered and masked once for both sides."""
    from itertools import islice

    from transformers import AutoTokenizer

    from jobs.data.catalogue import example_rows
    from jobs.data.formats import conversations
    from jobs.data.render import Renderer
    from orchestrator.settings import load_settings

    rows = islice(conversations(example_rows("finance-entities/train", load_settings().cache)), count)
    rendered = Renderer(AutoTokenizer.from_pretrained(model)).tokens([conversation for conversation, _ in rows])
    with target.open("w") as out:
        for tokens in (tokens for row in rendered for tokens in row):
            ids = [int(token) for token in tokens.ids]
            labels = [token if learned else -100 for token, learned in zip(ids, tokens.loss_mask, strict=True)]
            out.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


if __name__ == "__main__":
    main()
