"""`adaptory run` of a sweep and `adaptory sweep …`: what they do, what they print, and with which code they end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from orchestrator.commands import following_sweeps
from orchestrator.commands.backend import complete_sweep, complete_trial
from orchestrator.commands.following import line
from orchestrator.commands.plot_sweep import _against_rate, _figure, save
from orchestrator.runs.client import JobStatus
from orchestrator.runs.events import Event, EventWriter
from orchestrator.runs.result import AnswerSample, EvaluationResult, SweepCompute, SweepResult, TrialResult
from orchestrator.runs.states import RunState, TrialState
from orchestrator.runs.sweeps import SweepProgress, trials_to_stop
from orchestrator.spec.sweep import configs
from orchestrator.store import Store

ROOT = Path(__file__).parents[3]
SWEEP = """
sweep:
  search: {learning_rate: {choice: [1.0e-4, 1.0e-3, 1.0e-2]}, epochs: {choice: [1, 2]}}
  searcher: grid
"""
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
VALUES = {1e-4: 0.9, 1e-3: 0.5, 1e-2: None}
"""Validation loss by learning rate, less a tenth for a second epoch; the highest rate diverges."""


@pytest.fixture
def wide(spec: Path) -> Path:
    spec.write_text(spec.read_text().replace("name: sums", "name: wide") + SWEEP)
    return spec


def tries(store: Store, run: str, attempt: int, most: int = 6) -> list[TrialResult]:
    """The events of a job that tries the six configurations, two steps each an epoch; gives what they came to."""
    writer = EventWriter(store, run, attempt, "driver")
    writer.emit("state", state="running")
    writer.emit("phase", phase="training")
    writer.emit("sweep", plan={"placement": "packed", "why": "6 lanes are 2.4 times as fast as one"})
    results = []
    grid = [(rate, epochs) for rate in VALUES for epochs in (1, 2)]
    for number, (rate, epochs) in enumerate(grid[:most], 1):
        name, steps, value = f"t{number:02d}", 2 * epochs, VALUES[rate]
        config = {"train.learning_rate": rate, "train.epochs": epochs}
        writer.emit("trial", trial=name, config=config, state="pending")
        writer.emit("trial", trial=name, state="running", step=0, total_steps=steps)
        for step in range(1, steps + 1):
            loss = 2.0 / step if value is not None else 10.0**step
            writer.emit("trial", trial=name, state="running", step=step, epoch=step / 2, loss=loss, learning_rate=rate)
        if value is None:
            writer.emit("trial", trial=name, state="diverged", loss=float("nan"), message="The loss is nan at step 2.")
            results.append(TrialResult(name=name, config=config, state=TrialState.DIVERGED, message="The loss is nan."))
            continue
        value -= epochs / 10
        writer.emit("trial", trial=name, state="finished", step=steps, epoch=epochs, validation_loss=value)
        writer.emit("sweep", best=name if rate < 1e-3 else "t03" if epochs == 1 else "t04", metric=value)
        metrics = {"validation_loss": value, "train_loss": 0.3}
        results.append(
            TrialResult(
                name=name,
                config=config,
                state=TrialState.FINISHED,
                steps=steps,
                epochs=epochs,
                metrics=metrics,
                seconds=3.0,
            )
        )
    writer.close()
    return results


def wins(store: Store, run: str, attempt: int, plays: SimpleNamespace) -> JobStatus:
    compute = SweepCompute(steps=12, tokens=1000, seconds=9.0, separate_steps=18, separate_tokens=2500)
    result = SweepResult(
        trials=tries(store, run, attempt),
        best="t04",
        metric="validation_loss",
        mode="min",
        placement="packed",
        why="6 lanes are 2.4 times as fast as one",
        compute=compute,
    )
    plays.ends(store, run, attempt, adapter=plays.digest, sweep=result, metrics={"validation_loss": 0.3})
    return JobStatus.SUCCEEDED


@pytest.fixture
def succeeds(memory_cluster: Any, plays: SimpleNamespace) -> None:
    memory_cluster.plays = lambda store, run, attempt: wins(store, run, attempt, plays)


@pytest.fixture
def goes_on(memory_cluster: Any) -> None:
    """Two trials are finished, one runs, and three have not begun."""

    def begins(store: Store, run: str, attempt: int) -> JobStatus:
        tries(store, run, attempt, most=2)
        writer = EventWriter(store, run, attempt, "rank0")
        config = {"train.learning_rate": 1e-3, "train.epochs": 1}
        writer.emit("trial", trial="t03", config=config, state="running", step=1, total_steps=2, epoch=0.5, loss=1.5)
        writer.close()
        return JobStatus.RUNNING

    memory_cluster.plays = begins


# --- run


def test_a_dry_run_shows_every_trial(adaptory, wide, out_of_reach, monkeypatch):
    out_of_reach()
    monkeypatch.setattr("cluster.connect_if_running", lambda settings: None)
    answer = adaptory("run", wide, "--dry-run", "--set", "data.validation=rows.jsonl")
    assert answer.code == 0, answer.err
    rows = re.findall(r"^ ?(t\d\d) +(\S+) +(\d) +(\d+)", answer.out, re.MULTILINE)
    assert rows == [
        *(("t01", "0.0001", "1", "5"), ("t02", "0.0001", "2", "10"), ("t03", "0.001", "1", "5")),
        *(("t04", "0.001", "2", "10"), ("t05", "0.01", "1", "5"), ("t06", "0.01", "2", "10")),
    ]
    assert "6 trials, all combinations; asha stops the worse ones early" in answer.out
    assert "about 45" in answer.out
    assert "Nothing was started" in answer.err


def test_a_dry_run_in_json_has_the_configurations(adaptory, wide):
    options = ("--set", "sweep.trials=4", "--set", "sweep.searcher=random", "--json")
    planned = adaptory("run", wide, "--dry-run", *options).json["plan"]["sweep"]
    assert (planned["count"], planned["combinations"], planned["all"]) == (4, 6, False)
    from orchestrator.spec.loading import load_spec

    expected = configs(load_spec(wide, ["sweep.trials=4", "sweep.searcher=random"]))
    assert [one["config"] for one in planned["trials"]] == expected


def test_a_dry_run_of_a_learning_searcher_shows_what_is_tried_first(adaptory, wide):
    options = ("--set", "sweep.searcher=optuna", "--set", "sweep.search.learning_rate={loguniform: [1.0e-4, 1.0e-2]}")
    out = adaptory("run", wide, "--dry-run", *options).out
    assert "Trials that are tried first" in out
    assert re.search(r"t01 +0.0003", out)
    assert "The searcher optuna chooses the others by what earlier ones came to." in out
    assert "12 trials; asha" in out


def test_a_base_model_too_small_for_one_trial_is_told_before_anything_is_started(
    adaptory, wide, tiny_model, memory_cluster
):
    options = ("--set", f"base_model={tiny_model('llama')}", "--set", "sweep.search={rank: {choice: [4, 100000]}}")
    answer = adaptory("run", wide, *options)
    assert answer.code == 2
    assert "tuning.rank: 100000 is above the width" in answer.err
    assert memory_cluster.jobs == {}


def test_a_detached_sweep_says_how_to_watch_it(adaptory, wide, goes_on):
    out = adaptory("run", wide).out
    assert "adaptory sweep show wide" in out
    assert "adaptory runs events wide --follow" in out


def test_following_on_a_pipe_is_a_line_a_change_without_control_characters(adaptory, wide, succeeds, plays):
    answer = adaptory("run", wide, "--follow")
    assert answer.code == 0, answer.err
    assert not CONTROL.search(answer.out)
    assert "packed: 6 lanes are 2.4 times as fast as one" in answer.out
    assert re.search(r"^\S+ t04 pending: learning_rate 0.001, epochs 2$", answer.out, re.MULTILINE)
    assert re.search(r"^\S+ t04 finished: epoch 2.0 · loss 0.5000 · validation 0.3000$", answer.out, re.MULTILINE)
    assert re.search(r"^\S+ t05 diverged: .*The loss is nan at step 2.$", answer.out, re.MULTILINE)
    changes = re.findall(r"^\S+ (t\d\d) (\w+)", answer.out, re.MULTILINE)
    assert [state for name, state in changes if name == "t01"] == ["pending", "running", "finished"]
    assert "best so far: t04, validation_loss 0.3000 (learning_rate 0.001, epochs 2)" in answer.out
    end = answer.out[answer.out.index("Trials, the best first") :]
    assert re.findall(r"^ ?(t\d\d) +0\.", end, re.MULTILINE) == [
        "t04",
        "t03",
        "t02",
        "t01",
        "t05",
        "t06",
    ]
    assert "t04 is 0.1000 (25.0%) better than t03" in end
    assert "2 trials diverged, at learning rate 0.01." in end
    assert "12 steps and 1,000 tokens; one by one 18 steps and 2,500 tokens, 2.5 times as much" in end
    assert plays.digest in end
    assert "adaptory sweep plot wide --out wide" in end


def test_following_in_json_is_the_events(adaptory, wide, succeeds):
    lines = adaptory("run", wide, "--follow", "--json").lines
    assert {"trial", "sweep"} <= {line.get("type") for line in lines}
    assert lines[-1]["state"] == "succeeded"


def test_a_failed_sweep_shows_its_trials_and_ends_with_its_error(adaptory, wide, memory_cluster, plays):
    def all_diverge(store: Store, run: str, attempt: int) -> JobStatus:
        writer = EventWriter(store, run, attempt, "driver")
        for number, rate in ((1, 0.01), (2, 0.1)):
            config = {"train.learning_rate": rate}
            writer.emit("trial", trial=f"t0{number}", config=config, state="diverged", message="nan")
        writer.close()
        error = {"code": "training_diverged", "message": "Every trial diverged.", "hint": "Search lower rates."}
        plays.ends(store, run, attempt, RunState.FAILED, error=error)
        return JobStatus.FAILED

    memory_cluster.plays = all_diverge
    answer = adaptory("run", wide, "--follow")
    assert answer.code == 1
    assert "Every trial diverged, at learning rates 0.01 to 0.1. Search lower learning rates." in answer.out
    assert "Error: Every trial diverged. Search lower rates." in answer.err


# --- on a terminal


def said(number: int, type: Any = "trial", level: Any = "info", message: str = "", **data: Any) -> Event:
    created = time.time() - 100 + number
    return Event(id=f"a1-driver-{number}", created_at=created, type=type, level=level, message=message, data=data)


@pytest.mark.parametrize(("width", "height"), [(60, 14), (80, 24), (160, 50)])
def test_a_terminal_shows_as_many_trials_as_it_holds(monkeypatch, width, height):
    import io

    out = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
    monkeypatch.setattr(following_sweeps, "console", lambda: out)
    progress = SweepProgress(expected=30)
    events = [said(0, "message", message="The base model is loaded.\x1b]0;title\x07")]
    for number in range(1, 25):
        config = {"train.learning_rate": 1e-4 * number, "train.epochs": 2}
        state = "running" if number > 20 else "finished"
        events.append(
            said(
                number,
                trial=f"t{number:02d}",
                config=config,
                state=state,
                step=5,
                total_steps=10,
                validation_loss=number / 10,
            )
        )
    following_sweeps._table("wide", progress, [None, *events, None], out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "The base model is loaded." in text
    assert "\x1b]0;title" not in text
    screen = Console(file=io.StringIO(), width=width, height=height)
    screen.print(following_sweeps._Screen("wide", progress, screen))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    drawn = "\n".join(lines)
    assert all(f"t{number}" in drawn for number in (21, 22, 23, 24))
    assert "t01" in drawn, "the best"
    assert ("more" in drawn) == (height < 40)
    assert "30 trials: 6 pending, 4 running, 20 finished" in drawn
    assert "left" in drawn


def test_before_the_first_trial_a_terminal_says_what_goes_on():
    import io

    out = Console(file=io.StringIO(), width=80)
    screen = following_sweeps._Screen("wide", SweepProgress(expected=3), out)
    screen.phase = "the base model is loaded"
    out.print(screen)
    assert out.file.getvalue() == "Sweep wide · the base model is loaded\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (said(0, trial="t01", state="running", step=4, total_steps=8, loss=0.5), "t01 running: step 4/8, loss 0.5"),
        (said(0, trial="t01", state="stopped", message="by the scheduler"), "t01 stopped: by the scheduler"),
        (said(0, trial="t01", state="finished", metrics={"entity_f1": 0.5}), "t01 finished: entity_f1 0.5"),
        (said(0, trial="t01", state="finished", metrics="?"), "t01 finished"),
        (said(0, trial="t01"), "t01"),
        (said(0, "sweep", best="t01", metric=0.5), "best t01, metric 0.5"),
        (said(0, "sweep", message="The sweep is done."), "The sweep is done."),
    ],
)
def test_an_event_of_a_sweep_in_words(event: Event, words: str):
    assert line(event) == words


# --- show


def test_show_tells_which_trial_won_and_why(adaptory, wide, succeeds):
    adaptory("run", wide)
    out = adaptory("sweep", "show", "wide").out
    assert re.search(r"trials +6 trials: 4 finished, 2 diverged", out)
    assert "t04, validation_loss 0.3000 (learning_rate 0.001, epochs 2)" in out
    assert "Of the differences between 4 trials, this much goes with: learning_rate" in out
    whole = adaptory("sweep", "show", "wide", "--json").json
    assert (whole["best"], whole["value"], whole["mode"]) == ("t04", 0.3, "min")
    assert [trial["state"] for trial in whole["trials"]][-1] == "diverged"
    assert whole["importance"]["trials"] == 4
    assert whole["compute"]["separate_tokens"] == 2500
    assert "better than t03" in whole["why"][0]
    assert adaptory("runs", "show", "wide").out.count("t04, validation_loss 0.3000") == 1
    assert adaptory("runs", "show", "wide", "--json").json["result"]["sweep"]["best"] == "t04"


def measured(store: Store, run: str, attempt: int, plays: SimpleNamespace) -> JobStatus:
    """Two trials whose answers and whose losses disagree on which is the better, and what the winner came to on test rows."""
    writer, results = EventWriter(store, run, attempt, "driver"), []
    for name, rate, loss, f1 in (("t01", 1e-4, 0.2, 0.5), ("t02", 1e-3, 0.6, 0.75)):
        config = {"train.learning_rate": rate}
        figures = {"validation_loss": loss, "metrics": {"entity_f1": f1}}
        writer.emit("trial", trial=name, config=config, state="finished", step=2, epoch=1.0, **figures)
        metrics = {"validation_loss": loss, "entity_f1": f1}
        results.append(TrialResult(name=name, config=config, state=TrialState.FINISHED, steps=2, metrics=metrics))
    writer.close()
    sweep = SweepResult(trials=results, best="t02", metric="entity_f1", mode="max", placement="packed")
    scores = {"before": {"entity_f1": 0.0}, "few_shot": {"entity_f1": 0.25}, "after": {"entity_f1": 0.7}}
    sample = AnswerSample(prompt="Who?", expected="Ada", before="I", few_shot="you", after="Ada")
    evaluation = EvaluationResult(rows=9, examples=2.5, samples=[sample], **scores)
    plays.ends(store, run, attempt, adapter=plays.digest, sweep=sweep, evaluation=evaluation)
    return JobStatus.SUCCEEDED


def test_a_sweep_by_a_metric_shows_it_wherever_there_were_losses(adaptory, wide, memory_cluster, plays, tmp_path):
    memory_cluster.plays = lambda store, run, attempt: measured(store, run, attempt, plays)
    asked = [
        "data.test=rows.jsonl",
        "evaluate={metrics: [entity_f1], baseline: {few_shot: 3}}",
        "sweep.metric=entity_f1",
    ]
    answer = adaptory("run", wide, "--follow", *(word for text in asked for word in ("--set", text)))
    assert answer.code == 0, answer.err
    assert re.search(r"^\S+ t02 finished: .*validation 0.6000 · entity_f1 0.7500$", answer.out, re.MULTILINE)
    assert "best so far: t02, entity_f1 0.7500" in answer.out
    assert "Trials, the best first; entity_f1 on validation rows" in answer.out
    assert re.search(r"asked +expected +before +2.5-shot +after", answer.out)
    assert re.search(r"Who\? +Ada +I +you +Ada", answer.out)
    for command in (["sweep", "show"], ["runs", "show"]):
        out = adaptory(*command, "wide").out
        assert re.search(r"metric +before +2.5-shot +after +change", out)
        assert re.search(r"entity_f1 +0.000 +0.250 +0.700 +\+0.700", out)
    whole = adaptory("sweep", "show", "wide", "--json").json
    assert (whole["best"], whole["value"], whole["evaluation"]["few_shot"]) == ("t02", 0.75, {"entity_f1": 0.25})
    assert "t02 is 0.2500 (50.0%) better than t01, the second by entity_f1" in whole["why"][0]
    assert adaptory("sweep", "plot", "wide", "--out", tmp_path / "plots").code == 0


def test_show_while_it_runs_tells_where_its_trials_are(adaptory, wide, goes_on):
    adaptory("run", wide)
    out = adaptory("sweep", "show", "wide").out
    assert "6 trials: 3 pending, 1 running, 2 finished" in out
    assert re.search(r"t03 +0.001 +1 +0.5/1 +1.5000 +running", out)
    assert re.search(r"^ ?t02 \* +0.0001", out, re.MULTILINE)
    assert adaptory("sweep", "show", "wide", "--json").json["seconds_left"] is not None


def test_a_sweep_that_was_cancelled_does_not_say_that_its_trials_run(adaptory, wide, goes_on):
    adaptory("run", wide)
    adaptory("runs", "cancel", "wide")
    out = adaptory("sweep", "show", "wide").out
    assert "3 not tried, 1 unfinished, 2 finished" in out
    assert "running" not in out


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_a_narrow_terminal_still_tells_which_trial_is_which(adaptory, wide, succeeds, monkeypatch, width):
    adaptory("run", wide)
    monkeypatch.setattr("orchestrator.commands.showing_sweeps.console", lambda: Console(width=width))
    out = adaptory("sweep", "show", "wide").out
    assert max(map(len, out.splitlines())) <= width
    assert "t04" in out


def test_what_is_no_sweep_has_no_trials(adaptory, spec):
    adaptory("run", spec)
    for command in (["show", "sums"], ["plot", "sums"], ["stop-trial", "sums", "t01"]):
        answer = adaptory("sweep", *command)
        assert answer.code == 2
        assert "one fine-tune" in answer.err
    assert adaptory("sweep", "show", "none").code == 2


def test_plotting_a_sweep_as_a_run_says_how(adaptory, wide, succeeds):
    adaptory("run", wide)
    answer = adaptory("runs", "plot", "wide")
    assert answer.code == 1
    assert "`adaptory sweep plot wide --out wide` draws its trials" in answer.err


# --- stop-trial


def test_a_trial_is_stopped_by_name(adaptory, wide, goes_on, home):
    adaptory("run", wide)
    answer = adaptory("sweep", "stop-trial", "wide", "t03")
    assert answer.code == 0, answer.err
    assert "Asked wide to end trial t03" in answer.out
    assert adaptory("sweep", "stop-trial", "wide", "t03", "--json").json["asked_before"] is True
    run = adaptory("runs", "show", "wide", "--json").json["id"]
    assert trials_to_stop(Store(str(home / "store")), run) == {"t03"}


def test_a_trial_that_cannot_be_stopped_is_named(adaptory, wide, goes_on):
    adaptory("run", wide)
    over = adaptory("sweep", "stop-trial", "wide", "t01")
    assert (over.code, over.out) == (2, "")
    assert "Trial t01 of sweep wide is finished already." in over.err
    unknown = adaptory("sweep", "stop-trial", "wide", "t33", "--json")
    assert (unknown.code, unknown.json["error"]["code"]) == (2, "trial_not_found")
    assert "Did you mean t0" in unknown.json["error"]["hint"]


def test_the_shell_completes_sweeps_and_the_trials_that_go_on(adaptory, wide, spec, goes_on):
    adaptory("run", wide)
    adaptory("sweep", "show", "wide")
    assert complete_sweep("w") == ["wide"]
    assert complete_trial(SimpleNamespace(params={"name": "wide"}), "t") == ["t03", "t04", "t05", "t06"]  # type: ignore[arg-type]
    assert complete_trial(SimpleNamespace(params={"name": "none"}), "") == []  # type: ignore[arg-type]
    assert complete_trial(SimpleNamespace(params={}), "") == []  # type: ignore[arg-type]


def test_a_real_shell_gets_the_trials_of_the_sweep_that_was_typed(adaptory, wide, goes_on):
    adaptory("run", wide)
    adaptory("sweep", "show", "wide")
    words = {"COMP_WORDS": "adaptory sweep stop-trial wide t", "COMP_CWORD": "4"}
    script = "import sys; from orchestrator.cli import main; sys.exit(main())"
    env = {**os.environ, "_ADAPTORY_COMPLETE": "complete_bash", **words, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["t03", "t04", "t05", "t06"], done.stderr


# --- plot


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_plot_writes_four_pictures(adaptory, wide, succeeds, tmp_path):
    adaptory("run", wide)
    out = tmp_path / "deep" / "pictures"
    assert adaptory("sweep", "plot", "wide", "--out", out).code == 0
    names = ["importance.png", "learning-rate.png", "losses.png", "parallel.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(is_png(path) for path in out.iterdir())
    answer = adaptory("sweep", "plot", "wide", "--json").json
    assert sorted(Path(file).name for file in answer["files"]) == names
    assert Path("wide/losses.png").exists()
    assert answer["importance"]["shares"]["train.learning_rate"] > 0.5


def test_plot_of_a_sweep_without_trials_says_so(adaptory, wide, memory_cluster):
    memory_cluster.plays = lambda store, run, attempt: JobStatus.RUNNING
    adaptory("run", wide)
    answer = adaptory("sweep", "plot", "wide")
    assert answer.code == 1
    assert "no trial has begun yet" in answer.err


def test_pictures_that_cannot_be_written(adaptory, wide, succeeds, tmp_path):
    adaptory("run", wide)
    (tmp_path / "file").write_text("")
    answer = adaptory("sweep", "plot", "wide", "--out", tmp_path / "file")
    assert answer.code == 1
    assert "cannot be written" in answer.err


def story(count: int, *, rate: bool = True) -> SweepProgress:
    """`count` trials, of which every third diverged and explodes, every fourth has no figure yet, and one has no configuration."""
    progress = SweepProgress(expected=count)
    for number in range(count):
        config: dict[str, Any] = {
            "train.epochs": 1 + number % 3,
            "tuning.targets": ["all-linear", ["q_proj"]][number % 2],
        }
        config |= {"train.learning_rate": 10 ** -(1 + number % 5)} if rate else {}
        config = {} if number == 7 else config
        diverged, silent = number % 3 == 2, number % 4 == 3
        figures = {} if silent else {"loss": 1e30 if diverged else 1.0 + number, "validation_loss": 0.5 + number / 50}
        state = "diverged" if diverged else "running" if silent else "stopped" if number % 2 else "finished"
        progress.take(said(2 * number, trial=f"t{number + 1:02d}", config=config, state="running", step=1, loss=2.0))
        progress.take(said(2 * number + 1, trial=f"t{number + 1:02d}", state=state, step=2, **figures))
    return progress


@pytest.mark.parametrize("count", [1, 2, 3, 4, 24])
@pytest.mark.parametrize("rate", [True, False])
def test_pictures_of_few_trials_many_and_broken_ones(tmp_path, count, rate):
    written = save(story(count, rate=rate), "wide", tmp_path)
    names = {path.name for path in written}
    assert names == {"losses.png", "parallel.png", "importance.png"} | ({"learning-rate.png"} if rate else set())
    assert all(is_png(path) for path in written)


def test_what_diverged_is_in_the_picture_too():
    """At rates beyond those of all others."""
    progress = SweepProgress()
    for number, (rate, state) in enumerate([(1e-4, "finished"), (1e-3, "stopped"), (1e-1, "diverged")]):
        value = None if state == "diverged" else 0.5 - rate
        progress.take(
            said(number, trial=f"t{number}", state=state, config={"train.learning_rate": rate}, validation_loss=value)
        )
    figure = _figure()
    assert _against_rate(figure, progress)
    [axes] = figure.axes
    low, high = axes.get_xlim()
    assert low < 1e-4 < 1e-1 < high
    marked = {one.get_label(): one.get_offsets().tolist() for one in axes.collections}
    assert marked["diverged"] == [[1e-1, 0.97]]
    assert marked["stopped early"] == [[1e-3, 0.499]]
    assert marked["t0, best"] == [[1e-4, 0.4999]], "finished before stopped"


def test_pictures_of_trials_that_have_not_begun_or_all_diverged(tmp_path):
    waiting = SweepProgress()
    waiting.take(said(0, trial="t01", state="pending", config={"train.learning_rate": 1e-3}))
    assert {path.name for path in save(waiting, "w", tmp_path)} == {
        "learning-rate.png",
        "parallel.png",
        "importance.png",
    }
    lost = SweepProgress()
    for number in range(3):
        config = {"train.learning_rate": 0.1 * (number + 1)}
        lost.take(said(number, trial=f"t{number}", state="diverged", config=config, step=1, loss=1e30))
    assert len(save(lost, "w", tmp_path)) == 4
