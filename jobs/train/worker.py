"""What each Ray Train worker runs: the phases of an attempt. The ranks take the same path; rank 0 speaks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.data import PreparedData, prepare
from jobs.train.checkpoints import Checkpoints
from jobs.train.control import Control
from jobs.train.loop import Hooks, mean_loss, train
from jobs.train.publish import publish
from jobs.train.schedule import learning_rates
from jobs.train.session import Session
from jobs.train.setup import Trainable, explained, make_trainable, validation_batches
from jobs.train.steps import Progress
from orchestrator.errors import AdaptoryError
from orchestrator.modeling.base_model import BaseModel, materialize, require_chat_template
from orchestrator.modeling.prompts import load_tokenizer
from orchestrator.runs.result import RunResult
from orchestrator.runs.states import RunState
from orchestrator.store import checkpoint_path

log = logging.getLogger(__name__)


def run_worker(session: Session) -> RunResult | None:
    """One attempt on one worker, to its end; rank 0 gets the result.

    Raises:
        AdaptoryError: of one rank among several, for `driver` to end the group with; alone, it is in the result.
    """
    store, run, attempt, keep = session.store, session.resolved.run, session.attempt, session.spec.train.checkpoint
    checkpoints = Checkpoints(store, run, attempt, keep, lambda text, **data: session.say("message", text, **data))
    try:
        return concluded(session, lambda control: _run(session, control, checkpoints))
    finally:
        checkpoints.finish()


def concluded(session: Session, work: Callable[[Control | None], RunResult]) -> RunResult | None:
    """What the work comes to, on rank 0; a failure is a result, too.

    Args:
        work: told what a person asks of the run, on rank 0.

    Raises:
        AdaptoryError: of one rank among several, for `driver` to end the group with; alone, it is in the result.
    """
    place = session.place
    control = Control(session.store, session.resolved.run, session.attempt) if place.rank == 0 else None
    try:
        result = work(control)
    except AdaptoryError as error:
        log.error("%s", error)
        if place.workers > 1:
            raise  # the other ranks may wait for this one in a collective: only ending the group frees them
        session.say("message", str(error), level="error")
        result = session.result(RunState.FAILED, error=error.to_dict())
    finally:
        if control:
            control.close()
    return result if place.rank == 0 else None


def _run(session: Session, control: Control | None, checkpoints: Checkpoints) -> RunResult:
    base, tokenizer, data = load(session)
    trainable, stop = fine_tune(session, base, data, checkpoints, lambda: control.wish if control else None)
    if stop is not None:
        return session.result(RunState.PAUSED if stop == "pause" else RunState.CANCELLED)
    return publish(session, trainable, base, tokenizer, data)


def fine_tune(
    session: Session,
    base: BaseModel,
    data: PreparedData,
    checkpoints: Checkpoints,
    wish: Callable[[], str | None],
    adapted: Callable[[Hooks, Trainable], Hooks] = lambda hooks, trainable: hooks,
) -> tuple[Trainable, str | None]:
    """From the base, or the newest checkpoint, to the last step; or to what ended it before: `pause` or `cancel`.

    Args:
        wish: asked after each step what a person wants; what rank 0 hears counts.
        adapted: what else is to happen around the steps.
    """
    spec, place = session.spec, session.place
    with session.phase("building"), explained(base.path):
        trainable = make_trainable(spec, base, place, data.train.lengths)
        batches = trainable.batches
        session.progress.total_steps = batches.total_steps
        _resume(session, checkpoints, trainable)
    with session.phase("training"):
        stop = train(
            trainable.model,
            trainable.engine,
            data.train,
            batches,
            learning_rates(spec.train, batches.total_steps),
            seed=spec.train.seed,
            progress=session.progress,
            hooks=adapted(_hooks(session, wish, checkpoints, trainable, data), trainable),
            rank=place.rank,
            workers=place.workers,
            slot=trainable.slot,
            device=place.device,
            share=getattr(spec.tuning, "dropout", 0.0) == 0.0,
        )
        checkpoints.wait()
    return trainable, stop


def load(session: Session) -> tuple[BaseModel, Any, PreparedData]:
    """The base model, its tokenizer, and the rows: what there is to train on."""
    with session.phase("loading"), explained(Path(session.resolved.base_model)):
        base = _base(session)
        tokenizer = load_tokenizer(base.path)
    with session.phase("preparing"):
        return base, tokenizer, _data(session, tokenizer)


def _base(session: Session) -> BaseModel:
    base = materialize(
        session.resolved.base_model,
        cache=session.cache,
        store=session.store,
        say=lambda text: session.say("message", text),
    )
    if session.spec.data.format != "text":
        require_chat_template(base.path, session.spec.base_model)
    return base


def _data(session: Session, tokenizer: Any) -> PreparedData:
    data = prepare(
        session.resolved.data,
        session.spec.data,
        tokenizer=tokenizer,
        max_length=session.spec.train.max_length,
        store=session.store,
        cache=session.cache,
        progress=lambda done: session.say("progress", phase="preparing", done=done, total=0),
    )
    r = data.report.train
    session.say(
        "message",
        f"{r.rows} rows of format {data.report.format}: {r.examples} to train on ({r.dropped} dropped, {r.truncated} "
        f"truncated), {r.tokens:,} tokens, {r.labelled_tokens / max(1, r.tokens):.0%} of them with loss.",
        report=data.report.model_dump(mode="json"),
    )
    return data


def _resume(session: Session, checkpoints: Checkpoints, trainable: Trainable) -> None:
    """Go on from the newest checkpoint, if there is one."""
    found = checkpoints.agreed(session.place)
    if found is None:
        return
    step, state, facts = found
    trainable.engine.load(state, step)
    progress = session.progress
    progress.step, progress.tokens = step, int(facts.get("tokens", 0))
    progress.loss, progress.validation_loss = facts.get("loss", math.nan), facts.get("validation_loss")
    progress.epoch = trainable.batches.epoch(step)
    session.say("message", f"Going on from the checkpoint at step {step} of {progress.total_steps}.", step=step)


# --- around the steps -----------------------------------------------------------------------------------------------


def _hooks(
    session: Session,
    wish: Callable[[], str | None],
    checkpoints: Checkpoints,
    trainable: Trainable,
    data: PreparedData,
) -> Hooks:
    place, keep, every = session.place, session.spec.train.checkpoint, session.spec.train.validate_every
    total_steps = session.progress.total_steps
    checkpoint_every = max(1, min(200, math.ceil(total_steps / 10))) if keep.every == "auto" else keep.every
    validate = None
    if data.validation is not None and len(data.validation):
        rows = data.validation
        batches = validation_batches(rows.lengths, trainable.network, place, session.spec.train)

        def validate(progress: Progress) -> None:
            progress.validation_loss = mean_loss(
                trainable.model,
                rows,
                batches,
                rank=place.rank,
                slot=trainable.slot,
                device=place.device,
                all_reduce=place.all_reduce,
            )
            session.say("metrics", step=progress.step, validation_loss=progress.validation_loss)

    def checkpoint(progress: Progress) -> None:
        state = trainable.engine.state()
        facts = {"tokens": progress.tokens, "loss": progress.loss, "validation_loss": progress.validation_loss}
        if session.events is not None:
            session.events.flush()  # what a checkpoint has behind it is on record, should the worker die next
        if state is not None:
            last = progress.step == progress.total_steps
            checkpoints.save(progress.step, state, facts, wait=last)
        session.report({"step": progress.step, **facts}, checkpoint_path(session.resolved.run, progress.step))

    return Hooks(
        on_step=lambda progress: _say_step(session, progress),
        validate=validate,
        checkpoint=checkpoint,
        asked_to_stop=lambda: place.agree(wish()),
        validate_every=checkpoint_every if every == "auto" else every,
        checkpoint_every=checkpoint_every,
        all_reduce=place.all_reduce,
    )


def _say_step(session: Session, progress: Progress) -> None:
    if "to_first_step" not in session.seconds:
        session.seconds["to_first_step"] = round(time.time() - session.resolved.created_at, 2)
    session.say(
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
