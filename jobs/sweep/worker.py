"""What each worker of a sweep runs: trials come and go between two steps of one packed group. The ranks do the same; rank 0 speaks."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import torch

from jobs.data import PreparedData
from jobs.sweep.broker import Orders, Report
from jobs.sweep.course import why_unshared
from jobs.sweep.courses import Courses
from jobs.sweep.measuring import measure_of
from jobs.sweep.packed import PackedGroup
from jobs.sweep.planning import FULL, Pace, lanes
from jobs.train.artifact import PUBLISHED, check_effect, load_adapter
from jobs.train.control import Control
from jobs.train.loop import mean_loss
from jobs.train.publish import publish_checked
from jobs.train.session import Session
from jobs.train.setup import Place, explained, load_network, validation_batches
from jobs.train.worker import concluded, load
from orchestrator.errors import AdapterError, AdaptoryError, TrialRunsAlone
from orchestrator.modeling.base_model import BaseModel
from orchestrator.modeling.dtypes import DTYPES
from orchestrator.modeling.loading import load_model
from orchestrator.registry.provenance import SweepRecord
from orchestrator.runs.result import RunResult, SweepResult, TrialResult
from orchestrator.runs.states import RunState
from orchestrator.spec.sweep import trial_spec, trunk_warmup
from orchestrator.store import trial_path

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
"""Between looks at what a person wants, of a group without trials."""
SAME_LOSS = {"float32": 1e-4, "bfloat16": 1e-2}
"""By how much, relative to it, the winner's validation loss may differ when it is computed once more from its files."""
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
"""In one forward pass: matmuls of a CPU are at their peak from a few hundred, those of a GPU want thousands."""


def run_sweep(session: Session, broker: Any) -> RunResult | None:
    """One attempt on one worker, to its end; rank 0 gets the result.

    Args:
        broker: handle of the actor `jobs.sweep.broker.Broker`.

    Raises:
        AdaptoryError: of one rank among several, for `driver` to end the group with; alone, it is in the result.
    """
    return concluded(session, lambda control: _run(session, control, broker))


def _run(session: Session, control: Control | None, broker: Any) -> RunResult:
    spec, place = session.spec, session.place
    assert spec.sweep is not None
    base, tokenizer, data = load(session)
    with session.phase("building"), explained(base.path):
        network = load_network(spec, base, place, whole=True)
        if spec.sweep.placement == "auto" and (why := why_unshared(network)):
            return session.result(RunState.FAILED, error=TrialRunsAlone(why).to_dict())  # the driver places them apart
        group = PackedGroup(
            network,
            data.train,
            data.validation,
            place,
            tokens_at_once=TOKENS_AT_ONCE[place.device.type],
            lanes=lanes(spec, network, place),
            pace=Pace(torch.get_num_threads() if place.device.type == "cpu" else 1, FULL[place.device.type]),
        )
        courses = Courses(session, group, base, len(data.train), measure_of(session, network, tokenizer, data))
        courses.restore()
    with session.phase("training"):
        end = _train(session, control, broker, courses)
        if end == "pause":
            courses.save()
        courses.saved()
    if end == "pause":
        return session.result(RunState.PAUSED)
    if isinstance(end, str):
        return session.result(RunState.CANCELLED)
    if end.error is not None:
        raise AdaptoryError.from_dict(end.error)
    assert end.best is not None
    assert group.pace is not None
    sweep = SweepResult.model_validate(end.sweep).model_copy(update={"why": group.pace.why})
    return _crown(session, end.best, sweep, network, base, tokenizer, data)


def _train(session: Session, control: Control | None, broker: Any, courses: Courses) -> Orders | str:
    """Until nobody will come any more, or a person wants something else: `pause` or `cancel`."""
    place = session.place
    moved: dict[str, Report] = {}
    if place.rank == 0:
        ray.get(broker.hello.remote())
    while True:
        said: dict[str, Any] = {}
        if place.rank == 0:
            patience = 0.0 if courses.busy else IDLE_SECONDS
            came: Any = ray.get(broker.sync.remote(courses.fresh, moved, patience))
            said = {"wish": control.wish if control else None, "orders": asdict(came), "save": courses.save_due}
            said["unclaimed"] = courses.unclaimed_for_long
        said = place.told(said)
        courses.fresh, orders = {}, Orders(**said["orders"])
        if said["wish"]:
            return str(said["wish"])
        courses.follow(orders)
        if said["unclaimed"]:
            courses.close_unclaimed()
        if orders.finish:
            return orders
        moved = courses.step() if courses.busy else {}
        if said["save"]:
            courses.save()


def crown(session: Session, best: str, sweep: SweepResult) -> RunResult | None:
    """See to a winner that other workers have trained."""

    def work(_: Control | None) -> RunResult:
        base, tokenizer, data = load(session)
        with session.phase("building"), explained(base.path):
            network = load_network(session.spec, base, session.place, whole=True)
        return _crown(session, best, sweep, network, base, tokenizer, data)

    return concluded(session, work)


def _crown(
    session: Session,
    best: str,
    sweep: SweepResult,
    network: Any,
    base: BaseModel,
    tokenizer: Any,
    data: PreparedData,
) -> RunResult:
    """Check, evaluate and publish the winner, as a run of its own would."""
    if session.place.rank:
        return session.result(RunState.SUCCEEDED)
    winner = sweep.winner
    assert winner is not None
    warmup = trunk_warmup(session.spec, winner.config, len(data.train))
    spec = trial_spec(session.spec, winner.config, warmup_steps=warmup)
    own = replace(session, resolved=session.resolved.model_copy(update={"spec": spec}))
    own.progress.step, own.progress.total_steps = winner.steps, winner.steps
    own.progress.loss = winner.metrics.get("train_loss", own.progress.loss)
    own.progress.validation_loss = winner.metrics.get("validation_loss")
    own.progress.tokens, own.progress.tokens_per_second = winner.tokens, math.nan  # trials share their time
    with tempfile.TemporaryDirectory(prefix="adaptory-", dir=session.cache) as folder:
        directory = Path(folder)
        with session.phase("publishing"):
            session.store.fetch(trial_path(session.resolved.run, best), directory)
            published, slot = _loaded(own, network, directory)
            probe = torch.as_tensor(data.train[0].ids.astype("int64"), device=session.place.device)
            keep = torch.arange(len(probe), device=probe.device)
            _check_won(own, published, slot, data, winner)
            with torch.no_grad():
                logits, plain = published.logits(probe, keep, slot), network.logits(probe, keep, None)
            probes = check_effect(logits.float(), plain.float())
        record = _record(session, sweep, winner)
        result = publish_checked(own, directory, published, base, tokenizer, data, probes, record)
    session.seconds |= own.seconds
    trials = [one.model_copy(update={"adapter": result.adapter}) if one is winner else one for one in sweep.trials]
    return result.model_copy(update={"sweep": sweep.model_copy(update={"trials": trials})})


def _record(session: Session, sweep: SweepResult, winner: TrialResult) -> SweepRecord:
    asked = session.spec.sweep
    assert asked is not None
    return SweepRecord(
        trial=winner.name,
        config=winner.config,
        search={name: one.model_dump(mode="json") for name, one in asked.space.items()},
        metric=sweep.metric,
        value=winner.metrics.get(sweep.metric),
        trials=dict(Counter(one.state.value for one in sweep.trials)),
        placement=sweep.placement,
    )


def _loaded(session: Session, network: Any, directory: Path) -> tuple[Any, str | None]:
    """A network that holds what the files say, and in which slot: the base with an adapter, or one of its own."""
    network.eval()
    if session.spec.tuning.type == "full":
        dtype, device = DTYPES[session.spec.train.dtype], session.place.device
        return load_model(directory, dtype=dtype, device=device).eval(), None
    load_adapter(network, PUBLISHED, directory)
    return network.eval(), PUBLISHED


def _check_won(session: Session, network: Any, slot: str | None, data: PreparedData, winner: TrialResult) -> None:
    """What is published is what won: from its files, it has the validation loss that it was chosen by.

    Raises:
        AdapterError: it has another; nothing is published.
    """
    won, rows, train = winner.metrics["validation_loss"], data.validation, session.spec.train
    assert rows is not None
    alone = Place(device=session.place.device)
    batches = validation_batches(rows.lengths, network, alone, train)
    again = mean_loss(network, rows, batches, slot=slot, device=alone.device)
    if not abs(again - won) <= SAME_LOSS[train.dtype] * abs(won):
        raise AdapterError(
            f"Loaded back from its files, {winner.name} has a validation loss of {again:.5g}, and it won with {won:.5g}; nothing is "
            "published.",
            hint="This is a defect of Adaptory: please report it with the run's log.",
            check="same",
        )
