"""The frame of the command: errors in one paragraph, exit codes, help, and what starting it costs."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from orchestrator import __version__, cli
from orchestrator.commands import output
from orchestrator.commands.following import Progress, line, show_events
from orchestrator.commands.plot import Curves, draw
from orchestrator.errors import AdaptoryError, SettingsError, StoreError
from orchestrator.runs.events import Event
from orchestrator.store import Store

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "ray", "transformers", "matplotlib", "sqlalchemy", "plotext", "pydantic", "yaml", "rich.console")


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    group = group or typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = list(commands())


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `adaptory schema` with its work replaced by raising an error; gives exit code, stdout and stderr."""

    def call(error: BaseException, *options: str) -> tuple[int, str, str]:
        def broken() -> dict[str, Any]:
            raise error

        monkeypatch.setattr("orchestrator.spec.loading.json_schema", broken)
        code = cli.main(["schema", *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# --- failures


def test_an_error_is_one_paragraph_on_stderr(failing):
    code, out, err = failing(SettingsError("ADAPTORY_HOME is empty.", hint="Set it."))
    assert (code, out, err) == (2, "", "Error: ADAPTORY_HOME is empty. Set it.\n")


def test_an_error_in_json_is_an_object_on_stdout(failing):
    code, out, err = failing(AdaptoryError("It broke.", hint="Mend it.", line=3), "--json")
    assert (code, err) == (1, "")
    assert json.loads(out) == {"error": {"code": "error", "message": "It broke.", "hint": "Mend it.", "line": 3}}


def test_brackets_in_an_error_are_no_markup(failing):
    assert "[bold]x[/bold]" in failing(AdaptoryError("[bold]x[/bold]"))[2]


def test_interrupting_is_quiet_and_130(failing):
    code, out, err = failing(KeyboardInterrupt())
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_a_fault_of_ours_is_one_line_and_a_file(failing, home, monkeypatch):
    code, _, err = failing(ZeroDivisionError("by zero"))
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    [crash] = (home / "logs").glob("crash-*.txt")
    assert str(crash) in err
    assert "ZeroDivisionError: by zero" in crash.read_text()
    monkeypatch.setenv("ADAPTORY_DEBUG", "1")
    assert "Traceback (most recent call last)" in failing(ZeroDivisionError("by zero"))[2]


def test_a_fault_of_ours_where_nothing_can_be_written(failing, home):
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file where a directory should be")
    code, _, err = failing(ZeroDivisionError("by zero"))
    assert code == 1
    assert "ADAPTORY_DEBUG=1" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["runs", "lst"], "Did you mean 'list'? `adaptory runs --help`"),
        (["run"], "Missing argument 'SPEC'. `adaptory run --help`"),
        (["run", "--nonsense"], "No such option: --nonsense"),
        (["runs", "list", "--limit", "x"], "`adaptory runs list --help`"),
    ],
)
def test_a_wrong_call_says_where_help_is(args: list[str], said: str, capsys):
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ")
    assert said in captured.err
    assert captured.out == ""


def test_a_wrong_call_in_json(capsys):
    assert cli.main(["runs", "show", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "Missing argument" in error["message"]
    assert error["code"] == "usage"


def test_a_reader_that_goes_away_is_no_crash(home):
    command = [sys.executable, "-m", "orchestrator.cli", "schema"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait()
    assert not (home / "logs").exists()


# --- help and cost


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"adaptory {__version__}\n"


def test_the_promised_commands_are_there():
    names = {" ".join(path) for path, _ in COMMANDS}
    runs = {f"runs {name}" for name in ("list", "show", "logs", "events", "plot", "cancel", "pause", "resume")}
    adapters = {
        f"adapters {name}"
        for name in (
            *("list", "show", "verify", "export"),
            *("import", "promote", "versions", "history", "diff", "sign"),
        )
    }
    sweep = {"sweep show", "sweep stop-trial", "sweep plot"}
    assert names >= {"run", "schema", "up", "down", "status", "doctor", "data preview", *runs, *adapters, *sweep}


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[" ".join(path) for path, _ in COMMANDS])
def test_a_command_says_what_it_does_with_an_example_and_speaks_json(path: tuple[str, ...], command: Any, capsys):
    assert cli.main([*path, "--help"]) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"Example: adaptory {' '.join(path)}" in text
    assert "--json" in text
    assert command.help


@pytest.mark.parametrize("group", ["adapters", "data", "runs", "sweep"])
def test_a_group_of_commands_has_an_example(group: str, capsys):
    assert cli.main([group, "--help"]) == 0
    assert f"Example: adaptory {group} " in capsys.readouterr().out


def test_starting_the_command_imports_nothing_heavy():
    """What `adaptory --help` costs is what it imports."""
    script = f"import sys, orchestrator.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bare_adaptory_shows_its_help(capsys):
    assert cli.main([]) == 2
    assert "Commands:" in capsys.readouterr().out


def test_schema_goes_to_a_file(tmp_path, capsys):
    assert cli.main(["schema", "--out", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["title"] == "Adaptory job spec"
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "s.json").read_text())


def test_the_shell_gets_its_completions():
    env = {**os.environ, "_ADAPTORY_COMPLETE": "complete_bash", "COMP_WORDS": "adaptory runs re", "COMP_CWORD": "2"}
    script = "import sys; from orchestrator.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "resume" in done.stdout


# --- rendering


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(events: list[Event | None], monkeypatch: pytest.MonkeyPatch, **env: str) -> str:
    screen = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", screen)
    show_events(events)
    return screen.getvalue()


def event(number: int, type: Any, message: str = "", level: Any = "info", **data: Any) -> Event:
    return Event(
        id=f"a1-driver-{number}", created_at=1000.0 + number, type=type, message=message, level=level, data=data
    )


EVENTS = [
    event(0, "phase", phase="training"),
    None,
    event(1, "metrics", step=4, total_steps=8, loss=0.5, tokens_per_second=1234.4, seconds_left=200),
    event(2, "message", "Checkpoint 4 is saved."),
    event(3, "message", "The disk is nearly full.", "warn"),
]


def test_a_terminal_gets_a_bar_in_colour_and_no_colour_when_asked(monkeypatch):
    text = shown(EVENTS, monkeypatch)
    assert "4/8" in text
    assert "loss 0.5000 · 1,234 tokens/s · 3 min 20 s left" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "Checkpoint 4 is saved." in text
    assert "warning: The disk is nearly full." in text
    assert "\x1b[33m" in text
    assert "\x1b[33m" not in shown(EVENTS, monkeypatch, NO_COLOR="1")


def test_progress_puts_events_together():
    progress = Progress()
    for each in [*EVENTS[2:3], event(5, "metrics", step=4, validation_loss=0.6), event(6, "progress", done=3, total=9)]:
        assert each is not None
        progress.take(each)
    assert (progress.step, progress.total_steps, progress.validation_loss) == (4, 8, 0.6)
    assert (progress.done, progress.total) == (3, 9)
    progress.take(event(7, "phase", phase="evaluation"))
    assert (progress.phase, progress.done, progress.total) == ("evaluation", 0, None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (event(0, "metrics", step=2, total_steps=4, loss=1.25), "step 2/4: loss 1.25"),
        (event(0, "metrics", step=1, total_steps=4), "step 1/4"),
        (
            event(0, "metrics", step=2, loss=1.5e30, learning_rate=float("inf")),
            "step 2: loss 1.5e+30, learning_rate inf",
        ),
        (event(0, "progress", phase="evaluation", done=3, total=60), "evaluation 3/60"),
        (event(0, "phase", phase="training"), "training begins"),
        (event(0, "state", state="running"), "state running"),
        (event(0, "message", "Hello."), "Hello."),
    ],
)
def test_an_event_in_words(given: Event, words: str):
    assert line(given) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, ""), (0.2, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float | None, words: str):
    assert output.duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((3, "3"), (1_500_000_000.0, "1,500,000,000"), (0.12345678, "0.1235"), (1234.56, "1,234.6"), ("x", "x")),
        *((4e37, "4e+37"), (10**38, "1e+38"), (float("nan"), "nan"), (-float("inf"), "-inf")),
    ],
)
def test_numbers(value: Any, words: str):
    assert output.number(value) == words


def test_a_loss_beyond_reason_is_short():
    assert Progress(loss=3.4e38, validation_loss=2.5).figures() == "loss 3.4e+38 · validation 2.5000"


def test_a_message_that_quotes_a_sentence_ends_once():
    assert str(AdaptoryError("It said: no..", hint="Look.")) == "It said: no. Look."
    assert str(AdaptoryError("It said: wait...")) == "It said: wait..."


def test_a_step_without_figures_is_no_half_sentence(capsys):
    show_events([event(0, "metrics", step=10, total_steps=20)])
    assert capsys.readouterr().out.endswith("step 10/20\n")


def test_a_schema_that_cannot_be_written(tmp_path, capsys):
    assert cli.main(["schema", "--out", str(tmp_path)]) == 1
    assert "cannot be written: Is a directory." in capsys.readouterr().err


def test_a_step_reported_again_after_a_resume_counts_once():
    events = [
        event(n, "metrics", step=step, loss=loss) for n, (step, loss) in enumerate([(1, 3.0), (2, 2.0), (2, 1.5)])
    ]
    assert Curves.of(events).loss == {1: 3.0, 2: 1.5}


def test_drawing_fits_its_width_even_with_one_point():
    for curves in (Curves(loss={1: 2.0}), Curves({1: 3.0, 2: 2.0}, {2: 2.5}, {1: 1e-3, 2: 5e-4})):
        text = draw(curves, width=60, colour=False)
        assert max(len(row) for row in text.splitlines()) <= 60
        assert "training loss" in text


def test_a_full_disk_is_no_fault_of_ours(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/state.db")

    monkeypatch.setattr("orchestrator.settings.load_settings", full)
    assert cli.main(["status"]) == 1
    said = capfd.readouterr().err
    assert "/somewhere/state.db cannot be written: No space left on device." in said
    assert "unexpected" not in said


def test_a_store_that_cannot_be_made_is_not_called_empty() -> None:
    with pytest.raises(StoreError, match="no directory can be made there") as caught:
        Store("/proc/nowhere").write("files/x", b"bytes")
    assert "ADAPTORY_STORE_URL" in str(caught.value.hint)
