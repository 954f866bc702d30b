"""A sweep in pictures: loss curves, the metric against the learning rate, parallel coordinates, what mattered.

Drawn without pyplot: no display, no global state. Each works with one trial, with trials that diverged, and with figures that are
missing, since a sweep is looked at while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OutputError
from orchestrator.runs.states import TrialState
from orchestrator.runs.sweeps import SweepProgress, Trial
from orchestrator.runs.winner import FEWEST, METHOD, a, importance, setting
from orchestrator.spec.sweep import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RATE, _EPOCHS = "train.learning_rate", "train.epochs"
_BAD = "tab:red"
_NAMED = 12
"""Most trials that a legend names; of more, only the best and those that diverged."""
_MARGIN = 1.3
"""Factor between the outermost learning rates and the picture's edges."""


def save(progress: SweepProgress, title: str, directory: Path) -> list[Path]:
    """Every picture that the sweep has something for, as PNGs; a picture of an earlier call is replaced.

    Raises:
        OutputError: the directory or a file cannot be written.
    """
    pictures: dict[str, Callable[[Figure, SweepProgress], bool]] = {
        "losses.png": _losses,
        "learning-rate.png": _against_rate,
        "parallel.png": _parallel,
        "importance.png": _importance,
    }
    written = []
    for name, draw in pictures.items():
        figure = _figure()
        if draw(figure, progress):
            figure.suptitle(title)
            written.append(_write(figure, directory / name))
    return written


def _figure() -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120, format="png")
    except OSError as error:
        hint = "Name another directory with --out."
        raise OutputError(f"{out} cannot be written: {error.strerror}.", hint=hint, file=str(out)) from error
    return out


# --- the pictures ---------------------------------------------------------------------------------------------------


def _losses(figure: Figure, progress: SweepProgress) -> bool:
    """Training loss above, validation loss below, by optimiser step."""
    trials = [trial for trial in progress.trials if trial.losses or trial.validation_losses]
    if not trials:
        return False
    training, validation = figure.subplots(2, 1, sharex=True)
    colour = _colours(progress, trials)
    for trial in trials:
        best = trial is progress.best
        style = {"color": colour(trial), "linewidth": 2.2 if best else 1.0, "alpha": 1.0 if best else 0.8}
        style |= {"linestyle": "--"} if trial.state is TrialState.DIVERGED else {}
        name = f"{trial.name}{', best' if best else ', diverged' if trial.state is TrialState.DIVERGED else ''}"
        training.plot(*_xy(trial.losses), label=name, **style)
        validation.plot(*_xy(trial.validation_losses), marker="o", markersize=4, label=name, **style)
    for axes, points, words in (
        (training, [trial.losses for trial in trials if trial.state is not TrialState.DIVERGED], "training loss"),
        (
            validation,
            [trial.validation_losses for trial in trials if trial.state is not TrialState.DIVERGED],
            "validation loss",
        ),
    ):
        _limit(axes, [value for each in points for value in each.values()])
        axes.set_ylabel(f"{words} (nats a token)")
        axes.grid(alpha=0.3)
    validation.set_xlabel("optimiser step")
    named = dict(zip(*reversed(training.get_legend_handles_labels()), strict=True))
    if len(trials) > _NAMED:
        named = {name: handle for name, handle in named.items() if name.endswith(("best", "diverged"))}
    if named:
        figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize="small")
    return True


def _against_rate(figure: Figure, progress: SweepProgress) -> bool:
    """Each trial's metric over its learning rate, coloured by epochs; those that diverged stand at the upper edge."""
    trials = [trial for trial in progress.trials if _is_positive(trial.config.get(_RATE))]
    if not trials:
        return False
    axes = figure.subplots()
    axes.set_xscale("log")
    lengths = sorted({trial.config[_EPOCHS] for trial in trials if _EPOCHS in trial.config}) or [None]
    shades = _shades(len(lengths))
    for length, shade in zip(lengths, shades, strict=True):
        of_length = [trial for trial in trials if trial.config.get(_EPOCHS) == length]
        points = [
            (trial.config[_RATE], value) for trial in of_length if (value := trial.value(progress.metric)) is not None
        ]
        label = None if length is None else f"{setting(length)} epoch{'s' if length != 1 else ''}"
        axes.plot(*_pairs(sorted(points)), color=shade, marker="o", linewidth=0.8, label=label)
    if gone := [trial.config[_RATE] for trial in trials if trial.state is TrialState.DIVERGED]:
        edge = axes.get_xaxis_transform()  # x in learning rates, y in shares of the picture
        heights = [0.97] * len(gone)
        axes.scatter(gone, heights, marker="x", s=70, color=_BAD, transform=edge, label="diverged", zorder=3)
    stopped = [trial for trial in trials if trial.state is TrialState.STOPPED]
    if early := [
        (trial.config[_RATE], value) for trial in stopped if (value := trial.value(progress.metric)) is not None
    ]:
        rates, values = _pairs(early)
        hollow: dict[str, Any] = {"facecolors": "none", "edgecolors": "tab:gray"}
        axes.scatter(rates, values, marker="s", s=70, label="stopped early", zorder=3, **hollow)
    best = progress.best
    if best in trials and best is not None and (value := best.value(progress.metric)) is not None:
        axes.scatter(
            [best.config[_RATE]], [value], marker="*", s=220, color="tab:orange", zorder=4, label=f"{best.name}, best"
        )
    rates_of_all = [trial.config[_RATE] for trial in trials]
    axes.set_xlim(
        min(rates_of_all) / _MARGIN, max(rates_of_all) * _MARGIN
    )  # marks of those that diverged do not widen it
    axes.set_xlabel("learning rate")
    axes.set_ylabel(progress.metric)
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    return True


def _parallel(figure: Figure, progress: SweepProgress) -> bool:
    """A line a trial through its parameters to its metric, coloured by that; one without it ends at the last parameter."""
    trials = [trial for trial in progress.trials if trial.config]
    if not trials:
        return False
    names = list(dict.fromkeys(name for trial in trials for name in trial.config))
    columns = [_Column(short_name(name), [trial.config.get(name, _MISSING) for trial in trials]) for name in names]
    values = [trial.value(progress.metric) for trial in trials]
    columns.append(_Column(progress.metric, [_MISSING if value is None else value for value in values]))
    axes, colour = figure.subplots(), _colours(progress, trials)
    for index, trial in enumerate(trials):
        heights = [column.heights[index] for column in columns]
        best = trial is progress.best
        dashed = "--" if trial.state is TrialState.DIVERGED else "-"
        axes.plot(
            range(len(columns)),
            heights,
            color=colour(trial),
            linestyle=dashed,
            linewidth=2.6 if best else 1.1,
            marker="o",
        )
    for place, column in enumerate(columns):
        axes.axvline(place, color="black", linewidth=0.8)
        for height, text in column.ticks:
            axes.annotate(
                text,
                (place, height),
                xytext=(5, 0),
                textcoords="offset points",
                fontsize="small",
                va="center",
                bbox=_BEHIND,
            )
    axes.set_xticks(range(len(columns)), [column.name for column in columns])
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(columns) - 0.5)
    axes.set_ylim(-0.08, 1.08)
    diverged = sum(trial.state is TrialState.DIVERGED for trial in trials)
    note = f"; dashed: {diverged} that diverged" if diverged else ""
    axes.set_xlabel(f"{len(trials)} trial{'s' if len(trials) != 1 else ''}, dark is better, the best thick{note}")
    return True


def _importance(figure: Figure, progress: SweepProgress) -> bool:
    """Bars of what each parameter explains; where there are too few trials, how many there are."""
    if not progress.named:
        return False
    found, axes = importance(progress.trials, progress.metric), figure.subplots()
    if found is None or not found.shares:
        count = sum(trial.value(progress.metric) is not None for trial in progress.trials)
        few = count < FEWEST
        words = f"{count} trials with {a(progress.metric)}: {f'it takes {FEWEST} to say' if few else 'they do not say'} what mattered"
        axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return True
    names = [short_name(name) for name in reversed(found.shares)]
    shares = list(reversed(found.shares.values()))
    bars = axes.barh(names, shares, color="tab:blue")
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=4)
    axes.set_xlim(0, 1.1)
    early = f", {found.stopped} stopped early" if found.stopped else ""
    axes.set_xlabel(f"{METHOD}\n{found.trials} trials with {a(progress.metric)}{early}")
    axes.grid(alpha=0.3, axis="x")
    return True


# --- details --------------------------------------------------------------------------------------------------------

_MISSING = object()


class _Column:
    """One axis of the parallel coordinates: heights from 0 to 1, with what stands at some of them.

    Numbers that span a factor of ten or more stand by their logarithm; what is no number, in the order of its appearance.
    """

    def __init__(self, name: str, values: Sequence[Any]):
        self.name = name
        given = [value for value in values if value is not _MISSING]
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
        distinct: list[Any] = sorted(set(given)) if numbers else list(dict.fromkeys(map(setting, given)))
        if not numbers:
            places = {text: float(index) for index, text in enumerate(distinct)}
        elif distinct and distinct[0] > 0 and distinct[-1] >= 10 * distinct[0]:
            places = {value: math.log(value) for value in distinct}
        else:
            places = {value: float(value) for value in distinct}
        low, high = min(places.values(), default=0.0), max(places.values(), default=1.0)
        scaled = {key: (place - low) / (high - low) if high > low else 0.5 for key, place in places.items()}
        self.heights = [
            math.nan if value is _MISSING else scaled[value if numbers else setting(value)] for value in values
        ]
        shown = distinct if len(distinct) <= _MOST_TICKS else [distinct[0], distinct[len(distinct) // 2], distinct[-1]]
        self.ticks = [(scaled[key], setting(key)) for key in shown]


_MOST_TICKS = 6
_BEHIND = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0}
"""Of words that stand where lines run."""


def _colours(progress: SweepProgress, trials: Sequence[Trial]) -> Callable[[Trial], Any]:
    """Dark for the best, light for the worst, red for what diverged, grey for what has no figure yet."""
    from matplotlib import colormaps

    ranked = [trial.name for trial in progress.ranked()]
    place = {name: index / max(1, len(ranked) - 1) for index, name in enumerate(ranked)}

    def colour(trial: Trial) -> Any:
        if trial.state is TrialState.DIVERGED:
            return _BAD
        return colormaps["viridis"](0.9 * place[trial.name]) if trial.name in place else "lightgray"

    return colour


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * index / max(1, count - 1)) for index in range(count)]


def _limit(axes: Axes, values: Sequence[float]) -> None:
    """Show what trials that did not diverge reached: one that exploded would press all others to the ground."""
    if values and max(values) > min(values):
        margin = 0.05 * (max(values) - min(values))
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _xy(points: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _pairs(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
