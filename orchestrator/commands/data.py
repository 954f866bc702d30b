"""`adaptory data …`: look at training data before a run does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands.output import Json, console, fields, number, print_json, say, table

if TYPE_CHECKING:
    from jobs.data import DataReport, PreviewRow, SplitReport
    from orchestrator.spec.job import DataSpec

app = typer.Typer(no_args_is_help=True, epilog="Example: adaptory data check data/train.jsonl")

Subject = Annotated[
    str,
    typer.Argument(metavar="SPEC_OR_DATA", help="A job spec (.yaml), or data: a file, glob, s3://, hf: or example:."),
]


@app.command("check", epilog="Example: adaptory data check data/train.jsonl")
def check(subject: Subject, as_json: Json = False) -> None:
    """Read every row, name the format, count, and stop at the first mistake with its file and line."""
    from jobs.data import check

    report = check(_data_spec(subject)[0], Path.cwd(), remote=True)
    if as_json:
        print_json(report)
    else:
        _show(report)


@app.command("preview", epilog="Example: adaptory data preview jobs/examples/finance-entities.yaml -n 1")
def preview(
    subject: Subject,
    model: Annotated[
        str | None, typer.Option(help="Base model whose chat template renders; default the spec's.")
    ] = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="How many rows.")] = 3,
    as_json: Json = False,
) -> None:
    """Show the first rows as the model will see them; what carries loss is coloured."""
    from jobs.data import preview

    data, base_model = _data_spec(subject)
    reference = model or base_model
    shown = preview(data, tokenizer=_tokenizer(reference) if reference else None, rows=rows, base_dir=Path.cwd())
    if as_json:
        print_json([row.model_dump(mode="json") for row in shown])
        return
    for row in shown:
        _show_row(row)
    if not reference:
        say("These are messages, not yet tokens: add --model to see them through a base model's chat template.")


def _data_spec(subject: str) -> tuple[DataSpec, str | None]:
    """The data that `subject` means, and the base model if it is a job spec."""
    if subject.lower().endswith((".yaml", ".yml")):
        from orchestrator.spec.loading import load_spec

        spec = load_spec(subject)
        return spec.data, spec.base_model
    from orchestrator.errors import DataError
    from orchestrator.spec.job import DataSpec

    if not subject:
        raise DataError("The name of the data is empty.", hint="Name a file, a directory, a glob or a job spec.")
    return DataSpec(train=subject, validation=0.0), None


def _tokenizer(reference: str) -> Any:
    from orchestrator.modeling.base_model import materialize
    from orchestrator.modeling.prompts import load_tokenizer
    from orchestrator.settings import load_settings

    return load_tokenizer(materialize(reference, cache=load_settings().cache, say=say).path)


def _show(report: DataReport) -> None:
    out = console()
    counts = table(
        "split", "format", "rows", "duplicates", "also in train", right=("rows", "duplicates", "also in train")
    )
    for name in ("train", "validation", "test"):
        split: SplitReport | None = getattr(report, name)
        if split is not None:
            figures = (number(split.rows), number(split.duplicates), "" if name == "train" else number(split.in_train))
            counts.add_row(name, split.format, *figures)
    out.print(counts)
    if report.unchecked:
        out.print(f"Not read here, only by the job: {', '.join(report.unchecked)}")
    for warning in report.warnings():
        say(f"Warning: {warning}")
    out.print("Every row can be used. See it as the model will: adaptory data preview")


def _show_row(row: PreviewRow) -> None:
    from rich.text import Text

    out = console()
    marks = ("", "") if out.is_terminal and not out.no_color else ("⟦", "⟧")  # without colour, brackets tell
    text = Text()
    for piece in row.pieces:
        words = f"{marks[0]}{piece.text}{marks[1]}" if piece.loss else piece.text
        text.append(words, style="bold green" if piece.loss else "dim")
    counted = f"{row.labelled_tokens} of {row.tokens} tokens carry loss" if row.tokens is not None else None
    out.print(fields([("row", row.where), ("format", row.format), ("loss", counted)]))
    out.print(text)
    out.print()
