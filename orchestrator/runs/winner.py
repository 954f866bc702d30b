"""Why a sweep's best trial is the best: what mattered, how far behind the second is, and whether the search was wide enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.runs.run import Run
from orchestrator.runs.states import TrialState
from orchestrator.runs.sweeps import SweepProgress, Trial
from orchestrator.spec.search import Choice, Grid, LogUniform, RandInt, SearchSpace, Uniform
from orchestrator.spec.sweep import by_field, short_name

FEWEST = 4
"""Trials with a value, below which nothing is said of what mattered."""

_BINS = 4
_EDGE = 0.1
"""Share of a range that counts as its edge."""
_CLOSE = 0.01
"""Relative distance to the second below which the order of the two may be chance."""

METHOD = "share of the metric's variance that lies between a parameter's values (epsilon squared; of many values, in up to four bins)"


@dataclass(frozen=True)
class Importance:
    """How much of the differences between trials goes with each parameter, one at a time: what two do together is in none of them.

    The share is epsilon squared (Kelley 1935), the share of variance between the means of a parameter's values, less what
    as many groups of so many trials would show by chance. A parameter with many values is binned at its quantiles.
    """

    shares: dict[str, float]
    """Full name of a field → 0 to 1, largest first; a field of which too few values were tried is not there."""
    trials: int
    """With a value."""
    stopped: int
    """Of them, how many ended early and count with their last value."""


def search_space(run: Run) -> SearchSpace:
    """What the run searched, by full names; empty where another version wrote it otherwise."""
    try:
        found = TypeAdapter(SearchSpace).validate_python((run.spec.get("sweep") or {}).get("search"))
    except ValidationError:
        return {}
    return by_field(found)


def importance(trials: Sequence[Trial], metric: str) -> Importance | None:
    """None where there are too few trials with a value, or where all are equal."""
    known = [(trial, value) for trial in trials if (value := trial.value(metric)) is not None and math.isfinite(value)]
    values = [value for _, value in known]
    if len(known) < FEWEST or max(values) == min(values):
        return None
    shares = {}
    for name in dict.fromkeys(name for trial, _ in known for name in trial.config):
        share = _epsilon_squared(_grouped([(trial.config.get(name), value) for trial, value in known]))
        if share is not None:
            shares[name] = share
    stopped = sum(trial.state is TrialState.STOPPED for trial, _ in known)
    return Importance(dict(sorted(shares.items(), key=lambda item: -item[1])), len(known), stopped)


def reasons(progress: SweepProgress, space: SearchSpace) -> list[str]:
    """Sentences on why the best is the best, the most telling first; why there is none, if there is none."""
    best, metric = progress.best, progress.metric
    if best is None or (value := best.value(metric)) is None:
        return [_nothing(progress)]
    said = [_distance(progress, best, value)]
    said += _mattered(progress)
    said += _edges(best, space)
    said += _diverged(progress.trials)
    return said


# --- sentences ------------------------------------------------------------------------------------------------------


def figure(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"


def a(metric: str) -> str:
    """`a validation_loss`, `an entity_f1`"""
    return f"{'an' if metric[:1] in 'aeio' else 'a'} {metric}"


def setting(value: Any) -> str:
    """A configuration's value as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _nothing(progress: SweepProgress) -> str:
    trials, metric = progress.trials, progress.metric
    diverged = [trial for trial in trials if trial.state is TrialState.DIVERGED]
    if trials and len(diverged) == len(trials):
        rates = _rates(diverged)
        return f"Every trial diverged{rates}. Search lower learning rates."
    return f"No trial has reported {metric} yet." if not progress.settled else f"No trial came to report {metric}."


def _distance(progress: SweepProgress, best: Trial, value: float) -> str:
    metric = progress.metric
    other = next((trial for trial in progress.ranked() if trial is not best), None)
    if other is None or (second := other.value(metric)) is None:
        return f"{best.name} is the only trial with {a(metric)}."
    if second == value and metric != "validation_loss":
        return f"{best.name} and {other.name} are equal by {metric}; {best.name} has the lower validation loss."
    gap = abs(second - value)
    share = gap / abs(second) if second else math.inf if gap else 0.0
    relative = f" ({share:.1%})" if second else ""
    words = f"{best.name} is {figure(gap)}{relative} better than {other.name}, the second by {metric}"
    return f"{words}; so little may be chance." if share < _CLOSE else f"{words}."


def _mattered(progress: SweepProgress) -> list[str]:
    found = importance(progress.trials, progress.metric)
    if found is None:
        count = sum(trial.value(progress.metric) is not None for trial in progress.trials)
        few = f"{count} trial{'s' if count != 1 else ''} with {a(progress.metric)} cannot say which parameter mattered"
        return [f"{few} (that takes {FEWEST})."] if count < FEWEST else []
    if not found.shares:
        return []
    parts = [f"{short_name(name)} {share:.0%}" for name, share in found.shares.items()]
    early = f", {found.stopped} of them with the value at which they were stopped" if found.stopped else ""
    return [f"Of the differences between {found.trials} trials{early}, this much goes with: {', '.join(parts)}."]


def _edges(best: Trial, space: Mapping[str, Any]) -> list[str]:
    said = []
    for name, one in space.items():
        value = best.config.get(name)
        side = None if name == "train.seed" else edge(one, value)
        if side is not None and not (side == "lower" and value == 0):
            way = "upwards" if side == "upper" else "downwards"
            said.append(
                f"{short_name(name)} {setting(value)} is at the {side} edge of what was searched: widen the range {way}."
            )
    return said


def edge(one: Any, value: Any) -> str | None:
    """`lower` or `upper`, if the value lies at that end of a range; of a list, only if it has an inside."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if isinstance(one, LogUniform):
        place = math.log(value / one.low) / math.log(one.high / one.low) if value > 0 else 0.0
    elif isinstance(one, Uniform):
        place = (value - one.low) / (one.high - one.low)
    elif isinstance(one, RandInt):
        place = 0.0 if value == one.low else 1.0 if value == one.high else 0.5
        place = place if one.count > 2 else 0.5
    elif isinstance(one, Choice | Grid):
        numbers = [each for each in one.values if isinstance(each, int | float) and not isinstance(each, bool)]
        inside = len(numbers) < 3 or min(numbers) < value < max(numbers)
        place = 0.5 if inside else 0.0 if value <= min(numbers) else 1.0
    else:
        return None
    return "lower" if place <= _EDGE else "upper" if place >= 1 - _EDGE else None


def _diverged(trials: Sequence[Trial]) -> list[str]:
    diverged = [trial for trial in trials if trial.state is TrialState.DIVERGED]
    if not diverged:
        return []
    count = "One trial" if len(diverged) == 1 else f"{len(diverged)} trials"
    return [f"{count} diverged{_rates(diverged)}."]


def _rates(trials: Sequence[Trial]) -> str:
    """`, at learning rates 0.003 to 0.01`"""
    rates = sorted({rate for trial in trials if (rate := trial.config.get("train.learning_rate")) is not None})
    if not rates:
        return ""
    return f", at learning rate{'s' if len(rates) > 1 else ''} " + " to ".join(
        setting(rate) for rate in ([rates[0], rates[-1]] if len(rates) > 1 else rates)
    )


# --- details --------------------------------------------------------------------------------------------------------


def _grouped(pairs: Sequence[tuple[Any, float]]) -> list[list[float]]:
    """The metric's values by the parameter's; a parameter with so many values that most stand alone is binned at its quantiles."""
    groups: dict[str, list[float]] = {}
    numeric = all(isinstance(key, int | float) and not isinstance(key, bool) for key, _ in pairs)
    if numeric and 2 * len({key for key, _ in pairs}) > len(pairs):
        bins = max(2, min(_BINS, len(pairs) // 2))
        ordered = sorted({key for key, _ in pairs})
        place = {key: str(index * bins // len(ordered)) for index, key in enumerate(ordered)}
        pairs = [(place[key], value) for key, value in pairs]
    for key, value in pairs:
        groups.setdefault(setting(key), []).append(value)
    return list(groups.values())


def _epsilon_squared(groups: Sequence[Sequence[float]]) -> float | None:
    """None where there is one group only, or no group of more than one to say what chance does."""
    count = sum(map(len, groups))
    if len(groups) < 2 or count <= len(groups):
        return None
    mean = fmean(value for group in groups for value in group)
    total = sum((value - mean) ** 2 for group in groups for value in group)
    within = sum((value - fmean(group)) ** 2 for group in groups for value in group)
    between = total - within
    if total <= 0:
        return None
    return min(1.0, max(0.0, (between - (len(groups) - 1) * within / (count - len(groups))) / total))
