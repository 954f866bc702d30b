"""`adaptory schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.output import Json, print_json, say
from orchestrator.errors import OutputError


def register(app: typer.Typer) -> None:
    app.command("schema", epilog="Example: adaptory schema > adaptory.schema.json")(schema)


def schema(
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead.")] = None, as_json: Json = False
) -> None:
    """Print the JSON Schema of a job spec. With it an editor completes and checks what you write."""
    from orchestrator.spec.loading import json_schema

    if out is None:
        print_json(json_schema())
        return
    import json

    try:
        out.write_text(json.dumps(json_schema(), indent=2) + "\n")
    except OSError as error:
        raise OutputError(
            f"--out {out} cannot be written: {error.strerror}.", hint="Name another file.", file=str(out)
        ) from error
    say(f"Wrote {out}. In an editor: put `# yaml-language-server: $schema={out}` on a spec's first line.")
