"""The `adaptory` command: mounts its parts, and turns every failure into one paragraph and an exit code.

Exit codes: 0 done, 1 failed, 2 the input cannot be used, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from orchestrator import __version__
from orchestrator.commands import (
    adapter_versions,
    adapters,
    chat,
    cluster,
    data,
    keys,
    routes,
    runs,
    schema,
    sweeps,
    tenants,
    usage,
)
from orchestrator.commands.output import print_error, say
from orchestrator.errors import AdaptoryError, UsageError
from orchestrator.redaction import redact

app = typer.Typer(
    name="adaptory",
    help="Fine-tune language models on your own Ray cluster.",
    epilog="Example: adaptory run jobs/examples/finance-entities.yaml --follow",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich's help imports for longer than everything else that --help does
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _mount(part: typer.Typer, name: str, words: str) -> None:
    part.rich_markup_mode = app.rich_markup_mode
    app.add_typer(part, name=name, help=words)


runs.register(app)
adapter_versions.register(adapters.app)
_mount(adapters.app, "adapters", "List, show, import, promote, verify and export what was trained.")
_mount(data.app, "data", "Look at training data before a run does.")
_mount(keys.app, "keys", "Make, rotate and revoke API keys.")
_mount(routes.app, "routes", "Say which adapters answer under which public name.")
_mount(runs.app, "runs", "List, show, watch, stop and resume runs.")
_mount(sweeps.app, "sweep", "Show and draw a sweep's trials, and stop single ones.")
_mount(tenants.app, "tenants", "List and add tenants, and set what they may use.")
schema.register(app)
usage.register(app)
cluster.register(app)
chat.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adaptory {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


def main(args: list[str] | None = None) -> int:
    """Run the command; returns its exit code, and never lets a traceback reach a person's terminal."""
    args = sys.argv[1:] if args is None else args
    as_json = "--json" in args
    try:
        code = app(args, prog_name="adaptory", standalone_mode=False) or 0
    except AdaptoryError as error:
        print_error(error, as_json=as_json)
        code = error.exit_code
    except _USAGE_ERROR as error:
        code = _usage(error, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        code = 1
    except OSError as error:
        code = _system(error, as_json=as_json)
    except RuntimeError as error:
        code = _nobody(as_json=as_json) if "home directory" in str(error) else _crash(error, as_json=as_json)
    except Exception as error:
        code = _crash(error, as_json=as_json)
    return _flushed(code)


# --- failures -------------------------------------------------------------------------------------------------------

# Typer carries its own copy of Click since 0.27 and exports only the leaves of its exceptions.
_USAGE_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _usage(error: Exception, *, as_json: bool) -> int:
    """A wrong option or a missing argument. Bare `adaptory` and `adaptory runs` are answered with their help."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message())  # type: ignore[attr-defined]
        return 2
    where = f"`{context.command_path} --help` shows what it takes." if context else None
    message = error.format_message()  # type: ignore[attr-defined]
    message += "" if message.endswith((".", "?", ")")) else "."
    print_error(UsageError(message, hint=where), as_json=as_json)
    return getattr(error, "exit_code", 2)


def _system(error: OSError, *, as_json: bool) -> int:
    """A full or read-only disk, or a file of somebody else's: not our fault, wherever it came from."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
        return _crash(error, as_json=as_json)
    home = os.environ.get("ADAPTORY_HOME") or "~/.adaptory"
    where = f"{error.filename} cannot be written" if error.filename else f"A file cannot be written, likely in {home}"
    hint = "Make room or allow it there, or set ADAPTORY_HOME to another directory; what was stored before is intact."
    print_error(AdaptoryError(f"{where}: {error.strerror}.", hint=hint), as_json=as_json)
    return 1


def _nobody(*, as_json: bool) -> int:
    """A path such as `~ada/x` where there is no user of that name: pathlib raises a bare RuntimeError."""
    error = UsageError("A path begins with ~ and the name of a user who is not known.", hint="Write the whole path.")
    print_error(error, as_json=as_json)
    return error.exit_code


def _crash(error: Exception, *, as_json: bool) -> int:
    """Something we did not foresee: one line, and the traceback in a file to send to us."""
    text = "".join(traceback.format_exception(error))
    if os.environ.get("ADAPTORY_DEBUG"):
        say(redact(text))
    first = (str(error).strip() or "no message").splitlines()[0]
    message = f"Something unexpected went wrong ({type(error).__name__}: {first})."
    path = _write_crash(text)
    hint = f"This is a fault of Adaptory; the details are in {path}." if path else "Set ADAPTORY_DEBUG=1 to see where."
    print_error(AdaptoryError(message, hint=hint, traceback=str(path)), as_json=as_json)
    return 1


def _write_crash(text: str) -> Path | None:
    try:
        logs = Path(os.environ.get("ADAPTORY_HOME") or "~/.adaptory").expanduser() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        path = logs / f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        text = f"adaptory {__version__}, Python {sys.version.split()[0]}\n{sys.argv!r}\n\n{text}"
        path.write_text(redact(text))  # a person may have typed a key
        return path
    except OSError:
        return None


def _flushed(code: int) -> int:
    """Flush now: a reader that went away (`| head`) must not end in Python's own complaint at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
