"""A trial as Tune sees it: a thin process that leases a place in the group and hands on what it is told.

It imports no torch, holds no model and takes next to no CPU: dozens fit beside the group that computes them.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

import ray
from ray import tune

from jobs.sweep.broker import Dismissed
from jobs.sweep.configs import config_of

CPUS = 0.01
"""That a trial reserves: Tune wants something, and the group needs the cores."""


class ThinTrial(tune.Trainable):
    """Made with `tune.with_parameters(ThinTrial, broker=…)`. Started again, it is told its course from the beginning."""

    def setup(self, config: dict[str, Any], broker: Any = None) -> None:
        self._broker = broker
        self._number = 0
        self._lease()

    def step(self) -> dict[str, Any]:
        """Blocks until the group has the next report, or Tune has ended and takes none."""
        while True:
            try:
                report = ray.get(self._broker.report.remote(self.trial_id, self._holder, self._number))
            except LookupError:  # this process was stopped for longer than a lease lasts
                self._lease(go_on=True)
                continue
            except Dismissed:
                return {}  # an error would be shown to a person
            if report is not None:
                break
        self._number += 1
        return report | {"done": report["state"] != "running"}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._lease()
        return True

    def cleanup(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._broker.release.remote(self._of, self._holder))

    def _lease(self, *, go_on: bool = False) -> None:
        self._holder, self._of = uuid.uuid4().hex, self.trial_id
        self._number = self._number if go_on else 0
        ray.get(self._broker.lease.remote(self._of, config_of(self.config), self._holder))
