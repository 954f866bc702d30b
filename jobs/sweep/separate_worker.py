"""What each worker of a group runs whose trials train apart: of each trial a run's own phases, until what it has trained is in the store."""

from __future__ import annotations

import gc
import logging
import math
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from jobs import workers
from jobs.data import PreparedData, TestRow
from jobs.evaluate import BASE, Candidate
from jobs.sweep import history
from jobs.sweep.broker import RUNG, Config, Orders, Report
from jobs.sweep.measuring import Measure, Measured, rows_to_answer
from jobs.sweep.worker import crown
from jobs.train.artifact import PUBLISHED
from jobs.train.background import KEEP_SECONDS, patiently
from jobs.train.checkpoints import Checkpoints
from jobs.train.engines import State
from jobs.train.fence import check_still_ours
from jobs.train.loop import Hooks
from jobs.train.publish import loaded_back, write_artifact
from jobs.train.session import Session
from jobs.train.setup import Place, Trainable, give_back_freed_memory, uses_deepspeed
from jobs.train.steps import Progress
from jobs.train.worker import fine_tune, load
from orchestrator.errors import AdaptoryError, StoreError, Superseded
from orchestrator.modeling.base_model import BaseModel
from orchestrator.runs.events import Events, EventType, Level
from orchestrator.runs.result import SweepResult
from orchestrator.runs.states import RunState, TrialState
from orchestrator.spec.sweep import trial_spec, trunk_warmup
from orchestrator.store import Store, names_path, trial_path, trial_run

log = logging.getLogger(__name__)

IDLE_SECONDS = 10.0
"""That a group without a trial waits for one: Ray Tune needs a moment to make the next."""
LOOK_SECONDS = 1.0
"""Between looks at what is wanted of the trial."""


@dataclass
class Line:
    """Between a trial's rank 0 and the broker; on the other ranks there is nobody at the other end.

    Args:
        run: of the sweep.
        trial: Tune's id.
        group: that trains it.
        broker: handle of the actor `jobs.sweep.broker.Broker`; None on ranks other than 0.
    """

    store: Store
    run: str
    trial: str
    group: str
    broker: Any
    at: Report | None = None
    """Where the trial is, for people to watch."""
    wish: str | None = None
    """`pause`, `cancel`, or None: that it goes on."""
    lost: bool = False
    """Whether the broker has gone, and with it who would say whether the trial goes on elsewhere."""
    reports: list[Report] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Line:
        if self.broker is not None:
            self.reports = history.read(self.store, self.run, self.trial)
            self._tell(self.reports if self.is_over else [])
            threading.Thread(target=self._look, name="adaptory-line", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @property
    def is_over(self) -> bool:
        """Whether the trial came to its end in an attempt whose last words Tune did not keep."""
        return bool(self.reports) and self.reports[-1]["state"] != TrialState.RUNNING

    @property
    def goes_on(self) -> bool:
        """Whether somebody may go on with the trial from its checkpoints, as far as is known."""
        try:
            return self.lost or ray.get(self.broker.goes_on.remote(self.trial))
        except ray.exceptions.RayError as error:
            log.warning("%s", error)
            return True

    def report(self, said: Report) -> None:
        """Waits for what the scheduler decides about it. One that was reported before the trial was started anew is not news."""
        if self.broker is None:
            return
        if not self.reports or said["step"] > self.reports[-1]["step"]:
            self.reports.append(said)
        try:
            self.write()
        except StoreError as error:  # away for a moment: the next report brings this one along
            log.warning("%s", error)
        self._tell([said])

    def write(self) -> None:
        history.write(self.store, self.run, self.trial, self.reports)

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._tell([])

    def _tell(self, reports: list[Report]) -> None:
        try:
            told = self.broker.tell.remote(self.trial, self.group, reports, None if reports else self.at)
            self.wish = ray.get(told)
        except ray.exceptions.RayError as error:  # the driver has gone, and the broker with it
            log.warning("%s", error)
            self.wish, self.lost = "cancel", True


class Unwanted(Exception):
    """Somebody has ended the trial."""


def run_trials(session: Session, broker: Any, group: str) -> dict[str, Any] | None:
    """One trial after the other, until there is none for this group, and then perhaps the winner. Where DeepSpeed trains, whose state is the
    process's, one trial is all.

    Args:
        session: of the sweep.

    Returns:
        The result, unless it is the sweep's and the store has taken it.

    Raises:
        AdaptoryError: what ended a trial that is all; otherwise the broker is told.
    """
    stays = not uses_deepspeed(session.spec, session.place)
    while (orders := _orders(session, broker, group)).open:
        [(trial, config)] = orders.open.items()
        try:
            _run_trial(_for_trial(session, trial), broker, group, trial, config)
        except Superseded:
            raise
        except AdaptoryError as error:
            if not stays:
                raise
            state, message = history.ended_by(error)
            log.warning("trial %s %s: %s", trial, state, message)
            if ray.get(broker.left.remote(group, state, message)):
                history.forget_checkpoints(session.store, session.resolved.run, trial)
        if not stays:
            break
        gc.collect()  # its network holds itself
    if orders.best is None or orders.sweep is None:
        return session.result(RunState.SUCCEEDED).model_dump(mode="json")
    return crowned(session, orders.best, SweepResult.model_validate(orders.sweep))


def crowned(session: Session, best: str, sweep: SweepResult) -> dict[str, Any] | None:
    """See to the winner; returns the result if the store did not take it."""
    session.seconds["training"] = sweep.compute.seconds
    return workers.handed_in(session, crown(session, best, sweep))


def _orders(session: Session, broker: Any, group: str) -> Orders:
    """What this group is to do next, on every rank."""
    found = Orders()
    if session.place.rank == 0:
        try:
            found = ray.get(broker.assign.remote(group, IDLE_SECONDS))
        except ray.exceptions.RayError as error:  # the driver has gone
            log.warning("%s", error)
    return Orders(**session.place.told(asdict(found)))


def _for_trial(session: Session, trial: str) -> Session:
    """Its own seconds and progress; of the sweep's events it has what is wrong."""
    events = session.events
    if events is not None:
        events = _Warnings(events, _name(session, trial))
    progress = Progress(step=0, total_steps=0)
    return replace(session, events=events, seconds=dict(session.seconds), progress=progress, _open=[])


def _name(session: Session, trial: str) -> str:
    try:
        return session.store.read_json(names_path(session.resolved.run)).get(trial, trial)
    except StoreError as error:
        log.warning("%s", error)
        return trial


def _run_trial(session: Session, broker: Any, group: str, trial: str, config: Config) -> None:
    """From the trial's newest checkpoint to its end, or until somebody ends or pauses it.

    Raises:
        AdaptoryError: what ended it, TrainingDiverged among others.
    """
    place, store, run = session.place, session.store, session.resolved.run
    with Line(store, run, trial, group, None if place.rank else broker) as line:
        stop = place.agree(line.wish)  # `cancel` if it is over, and it may have waited long for its machines
        if stop is None:
            stop = _trained(session, line, config)
        if place.rank == 0 and stop != "pause" and not line.goes_on:
            history.forget_checkpoints(store, run, trial)


def _trained(session: Session, line: Line, config: Config) -> str | None:
    """Train, and keep what comes of it; or what ended it before: `pause` or `cancel`."""
    base, tokenizer, data = load(session)
    rows = _rows_that_decide(session, data)
    own = _as_a_run(session, line.trial, config, rows=len(data.train))
    keep = own.spec.train.checkpoint
    checkpoints = Checkpoints(
        own.store, own.resolved.run, own.attempt, keep, lambda text, **more: own.say("message", text, **more)
    )
    try:
        trainable, stop = fine_tune(
            own, base, data, checkpoints, lambda: line.wish, lambda hooks, it: _reporting(own, line, hooks, it)
        )
    except Unwanted:
        return "cancel"
    finally:
        checkpoints.finish()
    if stop is None:
        _keep(own, line, trainable, base, lambda state: _measured(own, rows, trainable, base, tokenizer, state))
    return stop


def _rows_that_decide(session: Session, data: PreparedData) -> list[TestRow]:
    """None where the validation loss does, and on ranks that do not answer."""
    sweep = session.spec.sweep
    assert sweep is not None
    if sweep.metric == "validation_loss" or session.place.rank:
        return []
    return rows_to_answer(session, data)


def _measured(
    session: Session, rows: list[TestRow], trainable: Trainable, base: BaseModel, tokenizer: Any, state: State
) -> Measured:
    """What the trained model scores, from its files; the other ranks have ended."""
    if not rows:
        return {}
    alone = replace(session, place=Place(device=session.place.device))
    give_back_freed_memory()
    with tempfile.TemporaryDirectory(prefix="adaptory-", dir=session.cache) as folder:
        directory = Path(folder) / "artifact"
        write_artifact(directory, session, trainable, base, state["weights"])
        network = loaded_back(directory, session, trainable, base)
        full = session.spec.tuning.type == "full"
        measure = Measure(alone, network, tokenizer, rows, lambda files: BASE if full else Candidate(PUBLISHED, files))
        return measure({session.resolved.run: directory})[session.resolved.run]


def _as_a_run(session: Session, trial: str, config: Config, rows: int) -> Session:
    """The trial's session, whose checkpoints lie in a place of their own."""
    job = session.spec
    spec = trial_spec(job, config, warmup_steps=trunk_warmup(job, config, rows))
    run = trial_run(session.resolved.run, trial)
    return replace(session, resolved=session.resolved.model_copy(update={"run": run, "spec": spec}))


def _reporting(session: Session, line: Line, hooks: Hooks, trainable: Trainable) -> Hooks:
    """A run's hooks, and at the end of each epoch a report that the scheduler decides about before the next step is taken."""
    place, batches = session.place, trainable.batches
    validate_as_a_run = hooks.validate

    def on_step(progress: Progress) -> None:
        hooks.on_step(progress)
        line.at = _said(progress, TrialState.RUNNING)

    def validate(progress: Progress) -> None:
        assert validate_as_a_run is not None
        validate_as_a_run(progress)
        if batches.ends_epoch(progress.step) and progress.step < progress.total_steps:
            line.report(_said(progress, TrialState.RUNNING) | {RUNG: progress.epoch})
            if place.agree(line.wish) == "cancel":
                raise Unwanted

    return replace(
        hooks,
        on_step=on_step,
        validate=validate if validate_as_a_run else None,
        validate_every=0 if session.spec.train.validate_every == "auto" else hooks.validate_every,
        validate_after=batches.ends_epoch,
    )


def _said(progress: Progress, state: TrialState) -> Report:
    """As the broker, Tune and events have it: what is a number."""
    said = {
        "step": progress.step,
        "total_steps": progress.total_steps,
        "epoch": progress.epoch,
        "loss": progress.loss,
        "learning_rate": progress.learning_rate,
        "grad_norm": progress.grad_norm,
        "tokens": progress.tokens,
        "validation_loss": progress.validation_loss,
    }
    numbers = {name: value for name, value in said.items() if value is not None and math.isfinite(value)}
    return {"state": state.value, **numbers}


def _keep(
    session: Session, line: Line, trainable: Trainable, base: BaseModel, measured: Callable[[State], Measured]
) -> None:
    """What was trained, in the store; then the last report.

    Args:
        measured: is given the trained weights, and says what the last report has besides.

    Raises:
        StoreError: it was away, or full, for `KEEP_SECONDS`.
    """
    state = trainable.engine.state()  # every rank takes part
    if state is None:
        return
    said = _said(session.progress, TrialState.FINISHED) | measured(state)
    line.reports = [*(one for one in line.reports if one["step"] < said["step"]), said]

    def publish() -> None:
        check_still_ours(session.store, line.run, session.attempt)
        with tempfile.TemporaryDirectory(prefix="adaptory-", dir=session.cache) as folder:
            directory = Path(folder) / "artifact"
            write_artifact(directory, session, trainable, base, state["weights"])
            metadata = {"history": line.reports}
            session.store.publish(trial_path(line.run, line.trial), directory, metadata, move=True)
        line.write()

    with session.phase("publishing"):
        patiently(publish, KEEP_SECONDS, session.say)
    line.report(said)


class _Warnings:
    """In the place of the sweep's events, which tell of a trial by its reports: of what its training says, the log gets all and the
    events what is wrong."""

    def __init__(self, events: Events, name: str):
        self._events, self._name = events, name

    def emit(self, type: EventType, message: str = "", *, level: Level = "info", **data: Any) -> None:
        if message:
            log.info("%s: %s", self._name, message)
        if level != "info":
            self._events.emit("message", f"{self._name}: {message}", level=level, **data)

    def flush(self) -> None:
        self._events.flush()
