"""Optuna as Tune's searcher, for metrics that a trial has at its end alone. Imported where it is asked for: it takes a second."""

from __future__ import annotations

from typing import Any

from ray.tune.search.optuna import OptunaSearch


class Optuna(OptunaSearch):
    """Tune's own looks for the metric in every report, and ends the sweep with a KeyError where it is not."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self.metric in result:
            super().on_trial_result(trial_id, result)
