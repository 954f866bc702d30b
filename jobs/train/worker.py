"""What each Ray Train worker runs: set up, train, publish, evaluate. The ranks take the same path; rank 0 speaks."""

from __future__ import annotations

import logging
import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.data import PreparedData, load_tokenizer, prepare
from jobs.evaluate import BASE, Candidate, answer, compare
from jobs.train.checkpoints import Checkpoints
from jobs.train.control import Control
from jobs.train.fence import check_still_ours
from jobs.train.loop import Hooks, Progress, mean_loss, train
from jobs.train.publish import (
    PUBLISHED,
    check_same,
    load_adapter,
    write_full_weights,
    write_trained_adapter,
)
from jobs.train.schedule import learning_rates
from jobs.train.setup import (
    Place,
    Trainable,
    explained,
    load_network,
    make_batches,
    make_trainable,
    validation_batches,
)
from orchestrator.errors import AdaptoryError, OutOfMemory
from orchestrator.modeling.base_model import BaseModel, materialize, require_chat_template
from orchestrator.modeling.decoder import adapter_tensors
from orchestrator.modeling.loading import DTYPES, full_tensors, load_model
from orchestrator.registry.adapters import publish_adapter, publish_weights
from orchestrator.registry.provenance import BaseModelRecord, Provenance
from orchestrator.runs.events import EventWriter
from orchestrator.runs.result import EvaluationResult, RunResult
from orchestrator.runs.states import RunState
from orchestrator.spec.job import FullTuning
from orchestrator.spec.resolved import ResolvedSpec
from orchestrator.store import Store, checkpoint_path

log = logging.getLogger(__name__)


def run_worker(
    resolved: ResolvedSpec,
    attempt: int,
    *,
    store: Store,
    cache: Path,
    place: Place,
    events: EventWriter | None,
    seconds: dict[str, float] | None = None,
    report: Callable[[dict[str, Any], str], None] = lambda metrics, checkpoint: None,
) -> RunResult | None:
    """One attempt on one worker, to its end; rank 0 gets the result.

    Args:
        events: where rank 0 says what happens; None on the others.
        seconds: time spent before this call, by phase.
        report: told of each checkpoint (metrics, path in the store) on every rank: Ray Train's barrier.

    Raises:
        OutOfMemory: of one rank among several; every other error of a person's is in the result.
    """
    session = _Session(resolved, attempt, store, cache, place, events, dict(seconds or {}), report)
    try:
        result = session.run()
    except AdaptoryError as error:
        if isinstance(error, OutOfMemory) and place.workers > 1:
            raise  # the other ranks wait in a collective: only ending the group frees them
        log.error("%s", error)
        session.say("message", str(error), level="error")
        result = session.result(RunState.FAILED, error=error.to_dict())
    finally:
        session.close()
    return result if place.rank == 0 else None


class _Session:
    """What the phases of one attempt share."""

    def __init__(
        self,
        resolved: ResolvedSpec,
        attempt: int,
        store: Store,
        cache: Path,
        place: Place,
        events: EventWriter | None,
        seconds: dict[str, float],
        report: Callable[[dict[str, Any], str], None],
    ):
        self.resolved, self.spec, self.attempt = resolved, resolved.spec, attempt
        self.store, self.cache, self.place, self.events = store, cache, place, events
        self.seconds, self.report = seconds, report
        self.control = Control(store, resolved.run, attempt) if place.rank == 0 else None
        self.checkpoints = Checkpoints(
            store,
            resolved.run,
            attempt,
            self.spec.train.checkpoint,
            lambda text, **data: self.say("message", text, **data),
        )
        self.progress = Progress(step=0, total_steps=0)
        self._first_step = True
        self._phase = ""

    def run(self) -> RunResult:
        spec = self.spec
        with self.phase("loading"), explained(Path(self.resolved.base_model)):
            base = self._base()
            tokenizer = load_tokenizer(base.path)
        with self.phase("preparing"):
            data = self._data(base, tokenizer)
        with self.phase("building"), explained(base.path):
            lengths = data.train.lengths
            trainable = make_trainable(
                spec,
                base,
                self.place,
                lambda net: len(make_batches(spec, lengths, net, self.place).micro_batches(0, 0)),
            )
            batches = make_batches(spec, lengths, trainable.network, self.place)
            self._resume(trainable, batches.total_steps)
        with self.phase("training"):
            stop = train(
                trainable.model,
                trainable.engine,
                data.train,
                batches,
                learning_rates(spec.train, batches.total_steps),
                seed=spec.train.seed,
                progress=self.progress,
                hooks=self._hooks(trainable, data, batches.total_steps),
                rank=self.place.rank,
                workers=self.place.workers,
                slot=trainable.slot,
                device=self.place.device,
                share=getattr(spec.tuning, "dropout", 0.0) == 0.0,
            )
            self.checkpoints.wait()
        if stop is not None:
            return self.result(RunState.PAUSED if stop == "pause" else RunState.CANCELLED)
        return self._publish(trainable, base, tokenizer, data)

    # phases

    def _base(self) -> BaseModel:
        base = materialize(
            self.resolved.base_model, cache=self.cache, store=self.store, say=lambda text: self.say("message", text)
        )
        if self.spec.data.format != "text":
            require_chat_template(base.path, self.spec.base_model)
        return base

    def _data(self, base: BaseModel, tokenizer: Any) -> PreparedData:
        def rows_done(done: int) -> None:
            self.say("progress", phase="preparing", done=done, total=0)

        data = prepare(
            self.resolved.data,
            self.spec.data,
            tokenizer=tokenizer,
            max_length=self.spec.train.max_length,
            store=self.store,
            cache=self.cache,
            progress=rows_done,
        )
        r = data.report.train
        self.say(
            "message",
            f"{r.rows} rows of format {data.report.format}: {r.examples} to train on ({r.dropped} dropped, {r.truncated} "
            f"truncated), {r.tokens:,} tokens, {r.labelled_tokens / max(1, r.tokens):.0%} of them with loss.",
            report=data.report.model_dump(mode="json"),
        )
        return data

    def _resume(self, trainable: Trainable, total_steps: int) -> None:
        self.progress.total_steps = total_steps
        found = self.checkpoints.latest()
        if found is None:
            return
        step, state, facts = found
        trainable.engine.load(state, step)
        self.progress.step, self.progress.tokens = step, int(facts.get("tokens", 0))
        self.progress.validation_loss = facts.get("validation_loss")
        self.say("message", f"Going on from the checkpoint at step {step} of {total_steps}.", step=step)

    def _hooks(self, trainable: Trainable, data: PreparedData, total_steps: int) -> Hooks:
        keep, every = self.spec.train.checkpoint, self.spec.train.validate_every
        checkpoint_every = max(1, min(200, math.ceil(total_steps / 10))) if keep.every == "auto" else keep.every
        validate = None
        if data.validation is not None and len(data.validation):
            rows, batches = data.validation, validation_batches(data.validation.lengths, trainable.network, self.place)

            def validate(progress: Progress) -> None:
                progress.validation_loss = mean_loss(
                    trainable.model,
                    rows,
                    batches,
                    rank=self.place.rank,
                    slot=trainable.slot,
                    device=self.place.device,
                    all_reduce=self.place.all_reduce,
                )
                self.say("metrics", step=progress.step, validation_loss=progress.validation_loss)

        def checkpoint(progress: Progress) -> None:
            state = trainable.engine.state()
            facts = {"tokens": progress.tokens, "loss": progress.loss, "validation_loss": progress.validation_loss}
            if self.events is not None:
                self.events.flush()  # what a checkpoint has behind it is on record, should the worker die next
            if state is not None:
                last = progress.step == progress.total_steps
                self.checkpoints.save(progress.step, state, facts, wait=last)
            self.report({"step": progress.step, **facts}, checkpoint_path(self.resolved.run, progress.step))

        def asked_to_stop() -> str | None:
            return self.place.agree(self.control.wish if self.control else None)

        return Hooks(
            on_step=self._on_step,
            validate=validate,
            checkpoint=checkpoint,
            asked_to_stop=asked_to_stop,
            validate_every=checkpoint_every if every == "auto" else every,
            checkpoint_every=checkpoint_every,
            all_reduce=self.place.all_reduce,
        )

    def _on_step(self, progress: Progress) -> None:
        if self._first_step:
            self._first_step = False
            self.seconds["to_first_step"] = round(time.time() - self._submitted_at(), 2)
        self.say(
            "metrics",
            step=progress.step,
            total_steps=progress.total_steps,
            epoch=round(progress.epoch, 3),
            loss=progress.loss,
            learning_rate=progress.learning_rate,
            grad_norm=progress.grad_norm,
            tokens=progress.tokens,
            tokens_per_second=round(progress.tokens_per_second, 1),
            seconds_left=round(progress.seconds_left, 1),
        )

    def _submitted_at(self) -> float:
        return self.seconds.get("submitted_at", self.resolved.created_at)

    def _publish(self, trainable: Trainable, base: BaseModel, tokenizer: Any, data: PreparedData) -> RunResult:
        """Write, load back, compare, evaluate, publish. The ranks part here: only rank 0 goes on past the gathering."""
        probe = torch.from_numpy(np.array(data.train[0].ids, dtype=np.int64)).to(self.place.device)
        keep = torch.arange(len(probe), device=self.place.device)
        trainable.model.eval()
        with torch.no_grad():
            trained = trainable.model.logits(probe, keep, trainable.slot).float()
        state = trainable.engine.state()  # every rank takes part
        if state is None:
            return self.result(RunState.SUCCEEDED)
        with tempfile.TemporaryDirectory(prefix="adaptory-", dir=self.cache) as folder:
            directory = Path(folder) / "artifact"
            full = isinstance(self.spec.tuning, FullTuning)
            with self.phase("publishing"):
                self._write(directory, trainable, base, state["weights"])
                checker = self._loaded_back(directory, trainable, base)
                probes = check_same(
                    trained,
                    lambda: checker.logits(probe, keep, None if full else PUBLISHED).float(),
                    lambda: (self._fresh(base) if full else checker).logits(probe, keep, None).float(),
                    tolerance=0.0 if checker is trainable.network else 1e-4 if self._exact else 2e-2,
                )
            evaluation = self._evaluate(checker, directory, base, tokenizer, data) if self.spec.evaluate else None
            with self.phase("publishing"):
                check_still_ours(self.store, self.resolved.run, self.attempt)
                digest = self._to_store(directory, base, data, evaluation, probes)
        return self.result(RunState.SUCCEEDED, adapter=digest, evaluation=evaluation)

    @property
    def _exact(self) -> bool:
        return self.spec.train.dtype == "float32"

    def _write(self, directory: Path, trainable: Trainable, base: BaseModel, masters: dict[str, torch.Tensor]) -> None:
        """In the dtype of training: exactly what the forward pass used."""
        values = {name: value.to(DTYPES[self.spec.train.dtype]) for name, value in masters.items()}
        if isinstance(self.spec.tuning, FullTuning):
            write_full_weights(directory, base.path, full_tensors(trainable.network, values))
        else:
            assert trainable.slot is not None
            tensors = adapter_tensors(trainable.network, trainable.slot, values)
            write_trained_adapter(directory, self.spec.tuning, base.loadable_name, tensors)

    def _loaded_back(self, directory: Path, trainable: Trainable, base: BaseModel) -> Any:
        """A network that holds what the files say: the trained one with one more slot, or a fresh one."""
        if isinstance(self.spec.tuning, FullTuning):
            return load_model(directory, dtype=DTYPES[self.spec.train.dtype], device=self.place.device).eval()
        whole = trainable.model is trainable.network or self.spec.deepspeed.stage != 3
        network = trainable.network if whole else self._fresh(base)
        load_adapter(network, PUBLISHED, directory)
        return network.eval()

    def _fresh(self, base: BaseModel) -> Any:
        return load_network(self.spec, base, self.place, whole=True).eval()

    def _evaluate(
        self, checker: Any, artifact: Path, base: BaseModel, tokenizer: Any, data: PreparedData
    ) -> EvaluationResult:
        spec = self.spec.evaluate
        assert spec is not None
        rows = data.test[: spec.rows]
        full = isinstance(self.spec.tuning, FullTuning)
        total = 2 * len(rows)

        def progress(offset: int) -> Callable[[int], None]:
            return lambda done: self.say("progress", phase="evaluating", done=offset + done, total=total)

        with self.phase("evaluating"):
            progress(0)(0)
            if full:
                (before,) = answer(self._fresh(base), tokenizer, rows, [BASE], spec.max_new_tokens, progress(0))
                (after,) = answer(checker, tokenizer, rows, [BASE], spec.max_new_tokens, progress(len(rows)))
            else:
                candidates = [BASE, Candidate(PUBLISHED, artifact)]
                before, after = answer(checker, tokenizer, rows, candidates, spec.max_new_tokens, progress(0))
        return compare(spec, rows, before, after)

    def _to_store(
        self,
        directory: Path,
        base: BaseModel,
        data: PreparedData,
        evaluation: EvaluationResult | None,
        probes: dict[str, float],
    ) -> str:
        provenance = Provenance.of(
            self.resolved,
            BaseModelRecord(
                reference=self.spec.base_model,
                digest=base.digest,
                model_type=base.model_type,
                loadable_name=base.loadable_name if base.source == "hub" else None,
            ),
            attempt=self.attempt,
            step=self.progress.step,
            metrics=self._metrics() | probes,
            evaluation=evaluation,
            data=data.report.sources,
            hardware={"workers": self.place.workers, "device": self.place.device.type},
        )
        if isinstance(self.spec.tuning, FullTuning):
            return publish_weights(self.store, directory, provenance)
        return publish_adapter(self.store, directory, base.digest, provenance, base=base.path)

    # what is said

    def say(self, type: Any, message: str = "", **data: Any) -> None:
        if self.events is not None:
            self.events.emit(type, message, **data)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name != self._phase:  # publishing goes on after evaluating, which a job may not do
            self.say("phase", phase=name)
            self._phase = name
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)

    def _metrics(self) -> dict[str, float]:
        p = self.progress
        out = {
            "train_loss": p.loss,
            "steps": float(p.step),
            "tokens": float(p.tokens),
            "tokens_per_second": round(p.tokens_per_second, 1),
            "peak_memory_bytes": float(_peak_memory(self.place)),
        }
        if p.validation_loss is not None:
            out["validation_loss"] = p.validation_loss
        return {name: value for name, value in out.items() if math.isfinite(value)}

    def result(self, state: RunState, **fields: Any) -> RunResult:
        return RunResult(
            attempt=self.attempt,
            state=state,
            metrics=self._metrics() if self.progress.step else {},
            seconds={name: value for name, value in self.seconds.items() if name != "submitted_at"},
            finished_at=time.time(),
            **fields,
        )

    def close(self) -> None:
        if self.control:
            self.control.close()
        self.checkpoints.finish()


def _peak_memory(place: Place) -> int:
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated(place.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
