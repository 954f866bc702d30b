"""The trials on one worker of a sweep: those that train, those that wait for a lane, and what each of them has reported."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from jobs.sweep import snapshots
from jobs.sweep.broker import PEERS, RUNG, Config, Orders, Report
from jobs.sweep.measuring import Measure, Measured
from jobs.sweep.packed import PackedGroup
from jobs.sweep.reports import TrialReport
from jobs.sweep.snapshots import Snapshot
from jobs.train.background import KEEP_SECONDS, Background, patiently
from jobs.train.exhausted import explained_exhaustion
from jobs.train.fence import check_still_ours
from jobs.train.session import Session
from orchestrator.errors import (
    AdaptoryError,
    CorruptObject,
    ModelError,
    NoFreeLane,
    ObjectMissing,
    Superseded,
    TrialRunsAlone,
)
from orchestrator.modeling.base_model import BaseModel
from orchestrator.spec.job import JobSpec
from orchestrator.spec.sweep import trial_spec, trunk_warmup
from orchestrator.store import checkpoint_path, checkpoints_path, trial_path

SNAPSHOT_SECONDS = 60.0
SNAPSHOT_PAUSES = 20
"""Times as long as writing a snapshot took are none written: the disk is others' too."""
UNCLAIMED_SECONDS = 60.0
"""For which a course waits for its trial, once it was restored or the broker was killed: Tune may have stopped it meanwhile."""


class Courses:
    """
    Args:
        rows: of training.
        measure: evaluates trials that finish; None: their validation loss decides.
    """

    def __init__(
        self, session: Session, group: PackedGroup, base: BaseModel, rows: int, measure: Measure | None = None
    ):
        self._session, self._group, self._base, self._rows = session, group, base, rows
        self._measure = measure
        self._waiting: dict[str, Config] = {}
        self._foretold: set[str] = set()
        """Of those that wait, whose first reports were another's."""
        self._unclaimed: set[str] = set()
        self._unclaimed_since, self._broker = 0.0, ""
        self._began, self._number = time.monotonic(), 0
        self._writing = Background()
        self.history: dict[str, list[Report]] = {}
        self.fresh: dict[str, list[Report]] = {}
        """What the broker has not been told."""

    @property
    def busy(self) -> bool:
        return bool(self._group.steps) or bool(self._waiting)

    def follow(self, orders: Orders) -> None:
        """Close, then open: whoever goes makes room for whoever comes."""
        if self._broker not in ("", orders.broker):  # what the one before was to say is lost
            self._await_claims({*self._group.steps, *self._waiting})
        self._broker = orders.broker
        for trial in orders.close:
            self._close(trial)
        for trial, config in orders.open.items():
            self._unclaimed.discard(trial)
            if trial in self.history:  # it went on, or ended, while its process or the group was started anew
                self.fresh[trial] = list(self.history[trial])
            if trial not in self._group.steps and not self._ended(trial):
                self._waiting[trial] = config
        self._seat()

    @property
    def unclaimed_for_long(self) -> bool:
        """Each rank has another clock: one of them says it for all."""
        return bool(self._unclaimed) and time.monotonic() - self._unclaimed_since > UNCLAIMED_SECONDS

    def close_unclaimed(self) -> None:
        for trial in sorted(self._unclaimed):
            self._close(trial)
        self._unclaimed.clear()

    def _await_claims(self, trials: set[str]) -> None:
        self._unclaimed, self._unclaimed_since = trials, time.monotonic()

    def step(self) -> dict[str, Report]:
        """One step of every lane; where each trial is then."""
        moved: dict[str, Report] = {}
        reports = self._group.step()
        measured = self._measured([report.trial for report in reports if report.state == "finished"])
        for report in reports:
            said = self._said(report, reports) | measured.get(report.trial, {})
            told = self.history.get(report.trial)
            if report.state == "running" and (
                report.validation_loss is None or (told and told[-1]["step"] >= report.step)
            ):
                moved[report.trial] = said  # or it was foretold
            else:
                if report.state == "finished":
                    self._keep(report.trial, said)
                self.history.setdefault(report.trial, []).append(said)
                self.fresh.setdefault(report.trial, []).append(said)
        return moved

    def _seat(self) -> None:
        for trial, config in list(self._waiting.items()):
            spec = self._spec(config)
            if trial not in self.history and self._foretell(trial, spec):
                continue
            try:
                self._group.open(trial, spec)
            except NoFreeLane:
                continue  # another one may ride a lane that is there
            except (ModelError, TrialRunsAlone) as error:
                self.history[trial] = [{"step": 0, "state": "failed", "error": error.to_dict()}]
                self.fresh[trial] = list(self.history[trial])
            else:
                if trial in self._foretold:
                    self._foretold.remove(trial)
                    self._count_alone(trial, -1)
                self._tell_of_the_way(trial)
            del self._waiting[trial]

    def _foretell(self, trial: str, spec: JobSpec) -> bool:
        """Have one that would begin anew report first what another reported on the same way: the scheduler may end it for that, before
        it costs a step."""
        found = self._group.forerunner(trial, spec)
        if found is None:
            return False
        way = [s for s in self.history.get(found.trial, []) if s["step"] <= found.steps and s["state"] == "running"]
        if way:
            self._tell(trial, way, found.total_steps)
            self._foretold.add(trial)
            self._count_alone(trial)
        return bool(way)

    def _count_alone(self, trial: str, times: int = 1) -> None:
        """What a run of its own would have computed up to the trial's last report."""
        last = self.history[trial][-1]
        self._group.alone.add_all(times * last["step"], times * last["tokens"])

    def _tell(self, trial: str, way: list[Report], total_steps: int) -> None:
        self.history[trial] = [said | {"total_steps": total_steps} for said in way]
        self.fresh[trial] = list(self.history[trial])

    def _tell_of_the_way(self, trial: str) -> None:
        """One that joins others late has come their way, and reports what they reported."""
        done, others = self._group.steps[trial], self._group.company(trial)
        if done and others:
            way = [said for said in self.history.get(others[0], []) if said["step"] <= done]
            self._tell(trial, way, self._group.total_steps(trial))

    def _spec(self, config: Config) -> JobSpec:
        job = self._session.spec
        return trial_spec(job, config, warmup_steps=trunk_warmup(job, config, self._rows))

    def _said(self, report: TrialReport, beside: list[TrialReport]) -> Report:
        """As the broker, Tune and events have it.

        Args:
            beside: all reports of the same step.
        """
        said = {
            name: value
            for name, value in asdict(report).items()
            if value is not None
            and name not in ("trial", "error")
            and not (isinstance(value, float) and not math.isfinite(value))
        }
        if report.error is not None:
            said["error"] = report.error.to_dict()
        if report.state == "running":
            said[RUNG] = report.epoch
            said[PEERS] = [
                [other.trial, other.validation_loss]
                for other in beside
                if other.state == "running" and other.epoch == report.epoch
                if other.trial != report.trial and other.validation_loss is not None
            ]
        computed, alone = self._group.computed, self._group.alone
        return said | {
            "compute": {
                "steps": computed.steps, "tokens": computed.tokens,
                "separate_steps": alone.steps, "separate_tokens": alone.tokens,
                "seconds": round(time.monotonic() - self._began, 2),
            }
        }  # fmt: skip

    def _measured(self, trials: list[str]) -> dict[str, Measured]:
        """What those that have just finished score, for their last reports."""
        if self._measure is None or not trials:
            return {}
        with tempfile.TemporaryDirectory(prefix="adaptory-", dir=self._session.cache) as folder:
            adapters = {trial: Path(folder) / trial for trial in trials}
            if self._session.place.rank == 0:
                for trial, directory in adapters.items():
                    self._group.write_adapter(trial, directory, self._base.loadable_name)
            return self._measure(adapters)

    def _keep(self, trial: str, said: Report) -> None:
        """A finished trial's adapter, in the store: the group may die before the sweep ends.

        Raises:
            StoreError: it was away, or full, for `KEEP_SECONDS`.
        """
        session = self._session

        def publish() -> None:
            if self._kept(trial):
                return  # a group before this one did
            check_still_ours(session.store, session.resolved.run, session.attempt)
            with tempfile.TemporaryDirectory(prefix="adaptory-", dir=session.cache) as folder:
                self._group.write_adapter(trial, Path(folder), self._base.loadable_name)
                history = [*self.history.get(trial, []), said]
                session.store.publish(trial_path(session.resolved.run, trial), Path(folder), {"history": history})

        if session.place.rank == 0:
            patiently(publish, KEEP_SECONDS, session.say)
        self._group.close(trial)

    def _ended(self, trial: str) -> bool:
        """Whether it has come to its end, in this group or in one before it."""
        place = self._session.place
        if trial not in self.history and (kept := place.told(self._kept(trial) if place.rank == 0 else None)):
            self.history[trial], self.fresh[trial] = kept, list(kept)
        return bool(self.history.get(trial)) and self.history[trial][-1]["state"] != "running"

    def _kept(self, trial: str) -> list[Report]:
        manifest = self._session.store.manifest(trial_path(self._session.resolved.run, trial))
        return manifest.metadata["history"] if manifest else []

    def _close(self, trial: str) -> None:
        self._waiting.pop(trial, None)
        self._foretold.discard(trial)
        if trial in self._group.steps:
            self._group.close(trial)

    # snapshots

    @property
    def save_due(self) -> bool:
        """Once a minute, and of what takes long more seldom. Rank 0 says it for all."""
        pause = max(SNAPSHOT_SECONDS, SNAPSHOT_PAUSES * self._writing.seconds)
        return not self._writing.busy and time.monotonic() - self._writing.ended_at > pause

    def save(self) -> None:
        """All courses as they are between two steps, beside the snapshot before; older ones go. It is written while training goes on;
        where the store cannot take it, the snapshot before is still there.

        Raises:
            Superseded: a newer attempt owned the run when the one before was to be written.
        """
        self._number += 1
        if self._session.place.rank:
            return
        snapshot, number = self._group.snapshot(), self._number
        history = {trial: list(reports) for trial, reports in self.history.items()}
        self._writing.start(lambda: self._write(number, snapshot, history))

    def saved(self) -> None:
        """Once a snapshot that is under way is written.

        Raises:
            Superseded: a newer attempt owns the run.
        """
        self._writing.wait()

    def _write(self, number: int, snapshot: Snapshot, history: dict[str, list[Report]]) -> None:
        session, run = self._session, self._session.resolved.run
        path = checkpoint_path(run, number)
        try:
            with (
                explained_exhaustion("saving"),
                tempfile.TemporaryDirectory(prefix="adaptory-", dir=session.cache) as folder,
            ):
                snapshots.write(Path(folder), snapshot)
                check_still_ours(session.store, run, session.attempt)
                session.store.publish(path, Path(folder), {"history": history}, move=True)
            for name in session.store.children(checkpoints_path(run)):
                if int(name) < number - 1:
                    session.store.delete(f"{checkpoints_path(run)}/{name}")
        except Superseded:
            raise
        except (AdaptoryError, OSError) as error:
            session.say("message", f"A snapshot could not be saved; the sweep goes on: {error}", level="warn")
            with contextlib.suppress(AdaptoryError):  # what it left is room for the next one
                if session.store.manifest(path) is None:
                    session.store.delete(path)

    def restore(self) -> None:
        """Go on from the newest whole snapshot, if there is one: the same on every rank."""
        session, run = self._session, self._session.resolved.run
        self._number = session.place.gathered(self._newest() if session.place.rank == 0 else 0)[0]
        if self._number == 0:
            return
        with tempfile.TemporaryDirectory(prefix="adaptory-", dir=session.cache) as folder:
            manifest = session.store.fetch(checkpoint_path(run, self._number), Path(folder))
            self._group.restore(Path(folder))
        self.history = manifest.metadata["history"]
        for trial in list(self._group.steps):  # what came to its end after the snapshot need not do so again
            if kept := session.place.told(self._kept(trial) if session.place.rank == 0 else None):
                self.history[trial] = kept
                self._group.close(trial)
        self._await_claims(set(self._group.steps))
        session.say("message", f"Going on with {len(self._unclaimed)} trials from snapshot {self._number}.")

    def _newest(self) -> int:
        """Number of the newest snapshot that is whole and undamaged; 0 if none is."""
        session, folder = self._session, checkpoints_path(self._session.resolved.run)
        for name in reversed(session.store.children(folder)):
            try:
                if session.store.manifest(f"{folder}/{name}") is None:
                    continue
                with tempfile.TemporaryDirectory(prefix="adaptory-", dir=session.cache) as copy:
                    session.store.fetch(f"{folder}/{name}", Path(copy))
                return int(name)
            except (CorruptObject, ObjectMissing) as error:
                session.say("message", f"Snapshot {name} is damaged and passed over: {error}", level="warn")
        return 0
