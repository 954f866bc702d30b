"""How the command speaks: tables and paragraphs for people, JSON for machines, colour only on a terminal."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.errors import AdaptoryError
from orchestrator.redaction import redact

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 160
"""Columns where there is no terminal to ask: wide enough that a table cuts nothing off."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
"""The option that every command which prints has."""


def console(*, error: bool = False) -> Console:
    """A console on stdout or stderr; rich itself leaves colour out for NO_COLOR and when it is no terminal."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else max(PIPE_WIDTH, shutil.get_terminal_size((PIPE_WIDTH, 24)).columns)
    return Console(stderr=error, width=width, highlight=False, emoji=False, markup=False)


def say(text: str) -> None:
    """A line for a person that is not the command's result: on stderr, so that stdout stays clean."""
    typer.echo(text, err=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


def print_json_line(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, default=_plain))


def print_error(error: AdaptoryError, *, as_json: bool) -> None:
    """One paragraph on stderr, or `{"error": {…}}` on stdout. A key that somebody typed in the wrong place stays secret."""
    if as_json:
        typer.echo(redact(json.dumps({"error": error.to_dict()}, indent=2, ensure_ascii=False, default=_plain)))
        return
    from rich.text import Text

    text = Text.assemble(("Error: ", "bold red"), redact(error.message))
    if error.hint:
        text.append(f" {redact(error.hint)}")
    console(error=True).print(text, soft_wrap=True)


def table(*columns: str, title: str | None = None, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """A plain table; columns named in `right` are numbers, those in `whole` are never broken over lines."""
    from rich import box
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        result.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in whole
        )
    return result


def fields(pairs: Sequence[tuple[str, Any]], *, title: str | None = None) -> Table:
    """Names and values, one pair a row; pairs without a value are left out."""
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    result.add_column(style="dim", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in pairs:
        if value is not None and value != "":
            result.add_row(name, value if hasattr(value, "__rich_console__") else str(value))
    return result


def duration(seconds: float | None) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(timestamp: float | None) -> str:
    """A time of this machine's clock: `2026-11-22 05:10:33`."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(timestamp)) if timestamp else ""


def short_moment(timestamp: float | None) -> str:
    """The same without year and seconds, for tables: `11-22 05:10`."""
    return moment(timestamp)[5:16]


def number(value: Any) -> str:
    """A figure as people read it: four digits that matter, thousands parted."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def _plain(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if dump else str(value)
