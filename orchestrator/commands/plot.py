"""A run's curves: training and validation loss and learning rate, as a picture and drawn in the terminal."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import OutputError, UsageError

if TYPE_CHECKING:
    from orchestrator.runs.events import Event

_PICTURES = (".png", ".svg", ".pdf")
_SERIES = ("loss", "validation_loss", "learning_rate")


@dataclass
class Curves:
    """Values by optimiser step. After a resume a step may be reported again: the newest report counts."""

    loss: dict[int, float] = field(default_factory=dict)
    validation_loss: dict[int, float] = field(default_factory=dict)
    learning_rate: dict[int, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.loss or self.validation_loss)

    def points(self) -> dict[str, list[tuple[int, float]]]:
        """Every curve as (step, value) pairs, by step."""
        return {name: sorted(getattr(self, name).items()) for name in _SERIES}

    @classmethod
    def of(cls, events: Iterable[Event]) -> Curves:
        curves = cls()
        for event in events:
            if event.type == "metrics" and "step" in event.data:
                for name in _SERIES:
                    if event.data.get(name) is not None:
                        getattr(curves, name)[int(event.data["step"])] = float(event.data[name])
        return curves


def require_format(out: Path) -> None:
    """
    Raises:
        UsageError: the name does not end as a picture that can be drawn.
    """
    if out.suffix.lower() not in _PICTURES and not out.is_dir():
        raise UsageError(
            f"--out {out}: {out.suffix or 'a name without a suffix'} is no kind of picture that is drawn.",
            hint=f"Let it end in {', '.join(_PICTURES)}, such as {out.with_suffix('.png')}.",
            value=str(out),
        )


def save(curves: Curves, title: str, out: Path) -> None:
    """`write_picture`, with what the file system says put in words.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        write_picture(curves, title, out)
    except OSError as error:
        hint = "Name another file with --out."
        raise OutputError(f"{out} cannot be written: {error.strerror}.", hint=hint, file=str(out)) from error


def write_picture(curves: Curves, title: str, out: Path) -> None:
    """Loss above, learning rate below, over the same steps. Drawn without pyplot: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    losses.plot(*_xy(curves.loss), color="tab:blue", linewidth=1.2, label="training loss")
    if curves.validation_loss:
        losses.plot(*_xy(curves.validation_loss), color="tab:orange", marker="o", label="validation loss")
    losses.set_title(title)
    losses.set_ylabel("loss (nats a token)")
    losses.grid(alpha=0.3)
    losses.legend()
    rates.plot(*_xy(curves.learning_rate), color="tab:green")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("optimiser step")
    rates.grid(alpha=0.3)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, format=out.suffix[1:].lower() or "png")


def draw(curves: Curves, *, width: int, height: int = 16, colour: bool = True) -> str:
    """The loss curves and, smaller, the learning rate, as text of at most `width` columns."""
    losses = {"training loss": (curves.loss, "hd"), "validation loss": (curves.validation_loss, "o")}
    text = _chart(losses, width, height, colour)
    if curves.learning_rate:
        text += "\n" + _chart({"learning rate": (curves.learning_rate, "hd")}, width, max(7, height // 2), colour)
    return text


def _chart(series: dict[str, tuple[dict[int, float], str]], width: int, height: int, colour: bool) -> str:
    import plotext

    figure = plotext.figure
    figure.clear.all()
    figure.theme("simple")  # the terminal's own background
    figure.plot_size(width, height)
    present = {name: (points, marker) for name, (points, marker) in series.items() if points}
    figure.title(", ".join(f"{name} ({'o' if marker == 'o' else 'line'})" for name, (_, marker) in present.items()))
    for points, marker in present.values():
        signal = figure.signal(*_xy(points), marker=marker)
        if marker == "hd" and len(points) > 1:
            signal.lines(True)
        figure.draw(signal)
    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # it remarks on values that lie close together, such as a single one
        text: str = figure.build().string(colorless=not colour)
    return text


def _xy(points: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(points)
    return steps, [points[step] for step in steps]
