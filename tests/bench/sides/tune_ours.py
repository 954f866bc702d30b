"""Ray Tune over our own loop, one process a trial: the usual way with our speed. Prints one JSON line.

`python tune_ours.py --case CASE.json [--early]`.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tuned


def train(trial: tuned.Case, case: tuned.Case) -> None:
    """What a run of its own computes, without Ray Train, store and checkpoints around it."""
    from ours_train import Rows
    from ray import tune

    from jobs.sweep.course import Course
    from jobs.train.artifact import write_trained_adapter
    from jobs.train.loop import SLOT, Hooks, mean_loss
    from jobs.train.loop import train as run_loop
    from jobs.train.setup import Place, make_trainable, micro_batch_tokens, use_threads, validation_batches
    from jobs.train.steps import Progress
    from orchestrator.modeling.decoder import Decoder, adapter_tensors
    from orchestrator.spec.job import JobSpec

    use_threads(case["threads"])
    spec, place = JobSpec.model_validate(trial["spec"]), Place()
    rows, held_out = Rows(Path(case["rows"])), Rows(Path(case["validation"]))
    base: Any = SimpleNamespace(path=Path(case["model"]))
    made = make_trainable(spec, base, place, rows.lengths)
    tokens = micro_batch_tokens(spec.train, made.network, place, int(max(rows.lengths)))
    course = Course("", spec, rows.lengths, tokens, 1)

    def on_step(progress: Progress) -> None:
        if course.reports(progress.step):
            cut = validation_batches(held_out.lengths, made.network, place, spec.train)
            loss = mean_loss(made.model, held_out, cut)
            made.network.train()
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            said = tuned.reported(loss, progress.epoch, trial["epochs"], steps=progress.step, peak_rss_mb=memory)
            if tuned.RUNG not in said:
                save()
            tune.report(said)

    def save() -> None:
        assert isinstance(made.network, Decoder)
        tensors = {name: t.to("cpu", copy=True) for name, t in adapter_tensors(made.network, SLOT).items()}
        with tempfile.TemporaryDirectory() as folder:
            write_trained_adapter(Path(folder), spec.tuning, case["model"], tensors)  # type: ignore[arg-type]

    run_loop(
        made.model,
        made.engine,
        rows,
        made.batches,
        course.learning_rate,
        seed=spec.train.seed,
        progress=Progress(step=0, total_steps=made.batches.total_steps),
        hooks=Hooks(on_step=on_step),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--early", action="store_true", help="ASHA ends trials")
    options = parser.parse_args()
    case = json.loads(options.case.read_text())
    tuned.answer(tuned.run(train, case, case["trials"], options.early))


if __name__ == "__main__":
    main()
