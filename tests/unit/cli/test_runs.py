"""`adaptory run` and `adaptory runs …`: what they do, what they print, and with which code they end."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
from rich.console import Console

import cluster
from orchestrator.cli import main
from orchestrator.commands import following
from orchestrator.commands.backend import Backend, complete_run
from orchestrator.errors import ClusterError
from orchestrator.runs.client import JobStatus
from orchestrator.runs.logs import StoreLogHandler
from orchestrator.runs.states import RunState
from orchestrator.store import control_path

# --- run


def test_a_detached_run_ends_at_once_and_says_how_to_watch_it(adaptory, spec, memory_cluster, plays):
    memory_cluster.plays = plays.keeps_running
    answer = adaptory("run", spec)
    assert answer.code == 0
    assert "Run sums (sums-" in answer.out
    assert "is queued" in answer.out
    assert "adaptory runs events sums --follow" in answer.out
    assert len(memory_cluster.jobs) == 1


def test_overrides_and_name_reach_the_run(adaptory, spec):
    assert adaptory("run", spec, "--set", "train.epochs=1", "--name", "other", "--json").json["name"] == "other"
    shown = adaptory("runs", "show", "other", "--json").json
    assert shown["spec"]["train"]["epochs"] == 1.0
    assert shown["resolved"]["spec"]["name"] == "other"


def test_the_environment_names_the_tenant_unless_the_spec_does(adaptory, spec, monkeypatch):
    monkeypatch.setenv("ADAPTORY_TENANT", "acme")
    assert adaptory("run", spec, "--json").json["tenant"] == "acme"
    assert adaptory("run", spec, "--name", "b", "--set", "tenant=default", "--json").json["tenant"] == "default"


def test_following_shows_progress_then_before_and_after_then_what_to_type(adaptory, spec, plays):
    answer = adaptory("run", spec, "--follow")
    assert answer.code == 0, answer.err
    assert "step 10/30" in answer.out
    assert "200 tokens/s" in answer.out
    table = answer.out.index("On 60 held-out rows")
    assert "entity_f1" in answer.out[table:]
    assert "+0.660" in answer.out[table:]
    assert "yes, Ada" in answer.out
    assert plays.digest in answer.out
    assert f"adaptory adapters verify {plays.digest[7:19]}" in answer.out


def test_following_in_json_is_lines_that_end_with_the_run(adaptory, spec, plays):
    lines = adaptory("run", spec, "--follow", "--json").lines
    assert {"phase", "metrics"} <= {line.get("type") for line in lines}
    assert lines[-1]["state"] == "succeeded"
    assert lines[-1]["adapter"] == plays.digest


def test_a_failed_run_ends_with_its_own_error_and_code_1(adaptory, spec, memory_cluster, plays):
    memory_cluster.plays = plays.fails
    answer = adaptory("run", spec, "--follow")
    assert answer.code == 1
    assert "Error: The loss is nan at step 4. Lower it." in answer.err
    assert "adaptory runs logs sums" in answer.err
    assert "adaptory runs resume" not in answer.err  # the same numbers would come out again
    again = adaptory("run", spec, "--name", "again", "--follow", "--json")
    assert again.code == 1
    assert again.lines[-1]["error"]["code"] == "training_diverged"


def test_a_failed_run_has_code_1_even_when_its_input_was_wrong(adaptory, spec, memory_cluster, plays):
    def finds_bad_data(store, run, attempt):
        error = {"code": "invalid_data", "message": "Row 3 is bad.", "hint": "Mend it."}
        plays.ends(store, run, attempt, RunState.FAILED, error=error)
        return JobStatus.FAILED

    memory_cluster.plays = finds_bad_data
    assert adaptory("run", spec, "--follow").code == 1


def test_control_c_while_following_leaves_the_run_alone(adaptory, spec, memory_cluster, plays, monkeypatch):
    memory_cluster.plays = plays.keeps_running

    def interrupted(events):
        next(events)
        raise KeyboardInterrupt

    monkeypatch.setattr(following, "show_events", interrupted)
    answer = adaptory("run", spec, "--follow")
    assert answer.code == 130
    assert "Run sums goes on" in answer.err
    assert "adaptory runs cancel sums" in answer.err
    assert "Traceback" not in answer.err
    assert list(memory_cluster.jobs.values()) == [JobStatus.RUNNING]
    assert adaptory("runs", "show", "sums", "--json").json["state"] == "running"


def test_the_data_is_named_and_rows_seen_twice_are_told(adaptory, spec):
    overlapping = ("--set", "data.validation=rows.jsonl")
    for options in ((), ("--dry-run",)):
        answer = adaptory("run", spec, *overlapping, *options)
        assert answer.code == 0
        assert "Warning: 40 validation rows are training rows too" in answer.err
    assert "Data: format prompt_completion; rows: " in adaptory("run", spec, "--name", "b").err


def test_a_second_run_of_one_name_is_refused_before_anything_is_started(adaptory, spec, memory_cluster, out_of_reach):
    assert adaptory("run", spec).code == 0
    out_of_reach()
    answer = adaptory("run", spec)
    assert answer.code == 2
    assert "already has a run 'sums'" in answer.err
    assert "--name sums-2" in answer.err
    assert len(memory_cluster.jobs) == 1


def test_of_two_who_submit_one_name_at_once_the_second_is_refused(adaptory, spec, memory_cluster, monkeypatch):
    """The other comes between our look at the name and our submission: while our cluster is being connected."""

    def the_other_is_quicker(settings, say):
        monkeypatch.setattr(cluster, "connect", lambda settings, say: memory_cluster)
        assert main(["run", str(spec)]) == 0
        return memory_cluster

    monkeypatch.setattr(cluster, "connect", the_other_is_quicker)
    answer = adaptory("run", spec)
    assert answer.code == 2
    assert "already has a run 'sums'" in answer.err
    assert len(memory_cluster.jobs) == 1


def test_a_store_url_with_a_password_is_refused_before_anything_is_started(adaptory, spec, monkeypatch, out_of_reach):
    monkeypatch.setenv("ADAPTORY_STORE_URL", "s3://key:hunter2@bucket/prefix")
    out_of_reach()
    answer = adaptory("run", spec)
    assert answer.code == 2
    assert "holds credentials" in answer.err
    assert "hunter2" not in answer.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": ""}, "rows.jsonl"),
        ({"rows": '{"prompt": "a", "completion": "b"}\n{"prompt": \n'}, "rows.jsonl:2"),
        ({"rows": '{"prompt": "a"}\n'}, "completion"),
        ({"set": "data.train=none.jsonl"}, "none.jsonl"),
        ({"set": "base_model=./no-such-model"}, "no-such-model"),
        ({"set": "resources.workers=64"}, "64"),
        ({"set": "data.train="}, "data.train"),
        ({"set": "data.train=~nobody-of-this-name/rows.jsonl"}, "begins with ~"),
        ({"set": "base_model=~nobody-of-this-name/model"}, "begins with ~"),
        ({"set": "data.train=gs://bucket/rows.jsonl"}, "s3://BUCKET/KEY"),
        ({"set": "train.epoch=1"}, "Did you mean train.epochs?"),
    ],
)
def test_a_mistake_is_told_before_anything_is_started(adaptory, spec, memory_cluster, change, said):
    if "rows" in change:
        Path("rows.jsonl").write_text(change["rows"])
    answer = adaptory("run", spec, *(["--set", change["set"]] if "set" in change else []))
    assert answer.code in (1, 2)
    assert "Error: " in answer.err
    assert said in answer.err
    assert memory_cluster.jobs == {}
    assert adaptory("runs", "list", "--json").json == []


# --- dry run


def test_a_dry_run_writes_and_shows_everything_and_starts_nothing(adaptory, spec, home, out_of_reach, monkeypatch):
    out_of_reach()
    monkeypatch.setattr(cluster, "connect_if_running", lambda settings: None)
    answer = adaptory("run", spec, "--dry-run")
    assert answer.code == 0, answer.err
    assert "prompt_completion" in answer.out
    assert "Nothing was started" in answer.err
    written = json.loads((home / "dry-runs" / "sums" / "spec.json").read_text())
    assert written["spec"]["train"]["warmup"] == 0.03
    assert len(written["data"]["train"][0]["sha256"]) == 64
    assert not (home / "store" / "files").exists()
    assert not (home / "state.db").exists()


def test_a_dry_run_asks_a_cluster_that_is_up_whether_the_job_fits(adaptory, spec, memory_cluster, monkeypatch):
    answer = adaptory("run", spec, "--dry-run", "--set", "resources.workers=100", "--json")
    assert (answer.code, answer.json["error"]["code"]) == (1, "insufficient_resources")
    assert adaptory("run", spec, "--dry-run", "--set", "resources.workers=2").code == 0
    memory_cluster.local = False  # of a cluster with an autoscaler, only its probe knows
    monkeypatch.setattr("cluster.probe._cached", lambda client, settings: None)
    answer = adaptory("run", spec, "--dry-run", "--set", "resources.workers=100")
    assert answer.code == 0
    assert "Note: what the cluster has is asked when a run is submitted." in answer.err

    def away(settings):
        raise ClusterError("http://far cannot be reached.")

    monkeypatch.setattr(cluster, "connect_if_running", away)
    answer = adaptory("run", spec, "--dry-run")
    assert answer.code == 0
    assert "was not compared with the cluster. http://far cannot be reached." in answer.err


@pytest.mark.parametrize("model", ["no/such", "s3://bucket/model", "pypi:nosuch", "smollm2-135m-instruct"])
def test_a_base_model_that_was_not_looked_at_is_said_to_be(adaptory, spec, model):
    answer = adaptory("run", spec, "--dry-run", "--set", f"base_model={model}")
    assert answer.code == 0
    assert f"Note: only the job will fetch the base model {model}, and see whether" in answer.err


def test_a_base_model_without_a_tokenizer_is_refused(adaptory, spec, tiny_model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model("llama"), bare, ignore=shutil.ignore_patterns("tokenizer.json"))
    for options in ([], ["--dry-run"]):
        answer = adaptory("run", spec, "--set", f"base_model={bare}", *options)
        assert answer.code == 2
        assert "has no tokenizer" in answer.err


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        (["train.max_length=8"], 2, "Every row of rows.jsonl is longer than max_length 8 tokens"),
        (["train.max_length=20", "data.too_long=error"], 2, "rows.jsonl:1: the row has"),
        (["train.max_length=8", "data.too_long=truncate"], 2, "All tokens of rows.jsonl are masked"),
        (["train.max_length=8", "data.train=[rows.jsonl, rows.jsonl]"], 0, "Every row of the first 64 of rows.jsonl"),
        (["data.train=calls.jsonl"], 2, "does not write tool calls (calls.jsonl:1)"),
        ([], 0, ""),
    ],
)
def test_the_first_rows_are_tokenised_where_the_model_is_here(adaptory, spec, tiny_model, changes, code, said):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]}
    Path("calls.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, call]}))
    options = [part for change in [f"base_model={tiny_model('llama')}", *changes] for part in ("--set", change)]
    answer = adaptory("run", spec, "--dry-run", *options)
    assert answer.code == code, answer.err
    assert said in answer.err


def test_more_rows_to_measure_on_than_to_learn_from_is_doubtful(adaptory, spec):
    answer = adaptory("run", spec, "--dry-run", "--set", "data.validation=0.9")
    assert answer.code == 0
    assert "rows are for training and" in answer.err


def test_a_dry_run_counts_the_steps(adaptory, spec):
    whole = adaptory("run", spec, "--dry-run", "--json", "--set", "data.validation=rows.jsonl").json
    assert whole["data"]["train"]["rows"] == 40
    assert whole["plan"]["steps"] == 10  # 40 rows, batches of 8, 2 epochs
    capped = adaptory("run", spec, "--dry-run", "--json", "--set", "train.max_steps=3").json
    assert capped["plan"]["steps"] == 3


# --- list and show


def test_no_runs_is_no_error(adaptory):
    answer = adaptory("runs", "list")
    assert (answer.code, answer.out) == (0, "")
    assert "adaptory run jobs/examples/finance-entities.yaml" in answer.err
    assert adaptory("runs", "list", "--json").json == []


def test_list_shows_the_newest_first_and_filters(adaptory, spec, memory_cluster, plays):
    adaptory("run", spec, "--name", "one")
    memory_cluster.plays = plays.fails
    adaptory("run", spec, "--name", "two")
    found = adaptory("runs", "list", "--json").json
    assert [(run["name"], run["state"]) for run in found] == [("two", "failed"), ("one", "succeeded")]
    assert [run["name"] for run in adaptory("runs", "list", "--state", "failed", "--json").json] == ["two"]
    text = adaptory("runs", "list").out
    assert text.index("two") < text.index("one")
    assert plays.digest[7:19] in text
    wrong = adaptory("runs", "list", "--state", "finished")
    assert wrong.code == 2
    assert "succeeded" in wrong.err


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_a_narrow_terminal_still_tells_which_is_which(adaptory, spec, monkeypatch, width):
    adaptory("run", spec, "--name", "finance-entities-2")
    monkeypatch.setattr("orchestrator.commands.showing.console", lambda: Console(width=width))
    rows = adaptory("runs", "list").out.splitlines()
    assert max(map(len, rows)) <= width
    [row] = [row for row in rows if "finance-entities-2" in row]
    assert "succeeded" in row
    assert ("base model" in rows[1]) == (width >= 80)


def test_show_tells_all_of_a_run(adaptory, spec, plays):
    adaptory("run", spec)
    text = adaptory("runs", "show", "sums").out
    for expected in (
        "succeeded",
        "smollm2-135m-instruct",
        plays.digest,
        "train_loss",
        "entity_f1",
        "load_model",
        "1.2",
    ):
        assert expected in text
    whole = adaptory("runs", "show", "sums", "--json").json
    assert whole["result"]["seconds"]["training"] == 60.0
    assert whole["progress"]["step"] == 30
    assert [attempt["number"] for attempt in whole["attempts"]] == [1]


def test_show_tells_why_a_run_failed(adaptory, spec, memory_cluster, plays):
    memory_cluster.plays = plays.fails
    adaptory("run", spec)
    text = adaptory("runs", "show", "sums").out
    assert "The loss is nan at step 4." in text
    assert "Lower it." in text


def test_an_unknown_run_names_the_nearest(adaptory, spec):
    adaptory("run", spec)
    answer = adaptory("runs", "show", "sum")
    assert answer.code == 2
    assert "Did you mean sums?" in answer.err
    assert adaptory("runs", "show", "sum", "--json").json["error"]["code"] == "run_not_found"


def test_reading_works_while_the_cluster_is_away(adaptory, spec, memory_cluster, plays):
    memory_cluster.plays = plays.keeps_running
    adaptory("run", spec)
    memory_cluster.up = False
    answer = adaptory("runs", "list", "--json")
    assert answer.code == 0
    assert [run["name"] for run in answer.json] == ["sums"]
    assert "Warning: " in answer.err


def test_reading_works_when_the_cluster_cannot_even_be_connected(adaptory, spec, monkeypatch):
    adaptory("run", spec)

    def away(settings):
        raise ClusterError("http://far cannot be reached.", hint="Check it.")

    monkeypatch.setattr(cluster, "connect_if_running", away)
    answer = adaptory("runs", "list")
    assert answer.code == 0
    assert "Warning: http://far cannot be reached." in answer.err


# --- logs and events


def test_logs_are_read_from_the_store(adaptory, spec, memory_cluster, plays):
    def logs_something(store, run, attempt):
        handler = StoreLogHandler(store, run, attempt, "driver")
        handler.emit(logging.LogRecord("jobs.train", logging.WARNING, "x.py", 1, "the disk is slow", None, None))
        handler.close()
        return plays.succeeds(store, run, attempt)

    memory_cluster.plays = logs_something
    adaptory("run", spec)
    assert "warning  the disk is slow" in adaptory("runs", "logs", "sums").out
    assert adaptory("runs", "logs", "sums", "--json").lines[0]["writer"] == "driver"
    assert adaptory("runs", "logs", "sums", "--follow").code == 0
    assert adaptory("runs", "logs", "sums", "--attempt", "2").out == ""


def test_a_job_that_died_before_it_could_log_left_its_words_with_ray(adaptory, spec, memory_cluster):
    memory_cluster.plays = lambda store, run, attempt: JobStatus.FAILED
    memory_cluster.printed = "started\n2026-11-22 05:10:33,123\tINFO cli.py:41 -- Job submission\n[2026-11-22 05:10:35] ImportError: no torch"
    answer = adaptory("run", spec, "--follow")
    assert answer.code == 1
    assert "ImportError: no torch" in answer.err
    first, second, third = adaptory("runs", "logs", "sums", "--json").lines
    assert (first["message"], first["time"] > third["time"]) == ("started", True)  # the run's own beginning
    assert third["time"] - second["time"] == pytest.approx(1.877)
    assert "ImportError: no torch" in adaptory("runs", "logs", "sums").out


def test_events_are_words_or_json_lines(adaptory, spec):
    adaptory("run", spec)
    text = adaptory("runs", "events", "sums").out
    assert "training begins" in text
    assert "step 30/30: loss 0.1" in text
    lines = adaptory("runs", "events", "sums", "--json", "-n", "2").lines
    assert len(lines) == 2
    assert all("created_at" in line for line in lines)


def test_following_events_goes_on_until_the_run_ends(adaptory, spec, memory_cluster, plays):
    memory_cluster.plays = plays.keeps_running
    run = adaptory("run", spec, "--json").json["id"]

    def finish() -> None:
        store = Backend().store
        plays.ends(store, run, 1, adapter=plays.digest)
        memory_cluster.jobs[f"{run}-a1"] = JobStatus.SUCCEEDED

    timer = threading.Timer(1.0, finish)
    timer.start()
    answer = adaptory("runs", "events", "sums", "--follow")
    timer.join()
    assert answer.code == 0
    assert "step 12" in answer.out
    assert "Run sums succeeded" in answer.out


# --- plot


def test_plot_writes_a_png_and_draws(adaptory, spec, tmp_path):
    adaptory("run", spec)
    answer = adaptory("runs", "plot", "sums", "--out", tmp_path / "deep" / "curves.png")
    assert answer.code == 0, answer.err
    assert (tmp_path / "deep" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "training loss" in answer.out
    assert "learning rate" in answer.out
    assert "\x1b[" not in answer.out  # no terminal, no colour
    quiet = adaptory("runs", "plot", "sums", "--no-terminal")
    assert "training loss" not in quiet.out
    assert (tmp_path / "sums.png").exists()
    points = adaptory("runs", "plot", "sums", "--json").json
    assert len(points["loss"]) == 30
    assert [step for step, _ in points["validation_loss"]] == [10, 20, 30]


@pytest.mark.parametrize(("name", "begins"), [("c.svg", b"<?xml"), ("c.pdf", b"%PDF"), ("C.PNG", b"\x89PNG")])
def test_plot_writes_what_the_name_says(adaptory, spec, tmp_path, name, begins):
    adaptory("run", spec)
    assert adaptory("runs", "plot", "sums", "--no-terminal", "--out", tmp_path / name).code == 0
    assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize("name", ["p.foo", "p", "p.jpg"])
def test_plot_draws_no_other_kind_of_picture(adaptory, spec, name):
    adaptory("run", spec)
    answer = adaptory("runs", "plot", "sums", "--out", name)
    assert answer.code == 2
    assert "such as p.png" in answer.err
    assert not Path(name).exists()


def test_plot_of_a_run_without_a_loss_yet_says_so(adaptory, spec, memory_cluster):
    memory_cluster.plays = lambda store, run, attempt: JobStatus.RUNNING
    adaptory("run", spec)
    answer = adaptory("runs", "plot", "sums")
    assert answer.code == 1
    assert "no loss yet" in answer.err
    assert not Path("sums.png").exists()


def test_plot_that_cannot_be_written_says_so(adaptory, spec, tmp_path):
    adaptory("run", spec)
    answer = adaptory("runs", "plot", "sums", "--out", tmp_path)
    assert answer.code == 1
    assert "cannot be written" in answer.err


# --- cancel, pause, resume


def test_cancel_stops_the_job(adaptory, spec, memory_cluster, plays):
    memory_cluster.plays = plays.keeps_running
    adaptory("run", spec)
    answer = adaptory("runs", "cancel", "sums")
    assert answer.code == 0
    assert "Run sums is cancelled." in answer.out
    assert list(memory_cluster.jobs.values()) == [JobStatus.STOPPED]
    again = adaptory("runs", "cancel", "sums", "--json")
    assert again.code == 1
    assert again.json["error"]["code"] == "illegal_transition"
    assert "from its last checkpoint, if it has one." in again.json["error"]["hint"]


@pytest.mark.parametrize("command", ["cancel", "pause", "resume"])
def test_a_run_that_has_succeeded_is_said_to_have(adaptory, spec, command):
    adaptory("run", spec)
    answer = adaptory("runs", command, "sums")
    assert answer.code == 1
    assert "Run sums has succeeded" in answer.err


def test_pause_waits_for_the_checkpoint_and_resume_makes_a_new_attempt(adaptory, spec, memory_cluster, plays):
    memory_cluster.plays = plays.keeps_running
    run = adaptory("run", spec, "--json").json["id"]
    store, obeyed = Backend().store, threading.Event()

    def obey() -> None:
        while not store.exists(control_path(run, 1)):
            obeyed.wait(0.05)
        plays.ends(store, run, 1, RunState.PAUSED)
        memory_cluster.jobs[f"{run}-a1"] = JobStatus.SUCCEEDED

    job = threading.Thread(target=obey)
    job.start()
    answer = adaptory("runs", "pause", "sums")
    job.join()
    assert answer.code == 0, answer.err
    assert "adaptory runs resume sums" in answer.out
    memory_cluster.plays = plays.succeeds
    assert adaptory("runs", "resume", "sums", "--follow").code == 0
    shown = adaptory("runs", "show", "sums", "--json").json
    assert (shown["state"], shown["attempt"]) == ("succeeded", 2)
    assert "Attempts" in adaptory("runs", "show", "sums").out


# --- completion


def test_the_shell_completes_names_of_runs(adaptory, spec, monkeypatch):
    adaptory("run", spec)
    adaptory("run", spec, "--name", "other")
    assert complete_run("su") == ["sums"]
    assert sorted(complete_run("")) == ["other", "sums"]
    monkeypatch.setenv("ADAPTORY_DATABASE_URL", "nonsense://")
    assert complete_run("su") == []


def test_a_run_is_over_when_the_local_ray_is(adaptory, spec, memory_cluster, plays, monkeypatch):
    memory_cluster.plays = plays.keeps_running
    assert adaptory("run", spec).code == 0
    assert adaptory("runs", "show", "sums", "--json").json["state"] == "running"
    monkeypatch.setattr("cluster.connect_if_running", lambda settings: None)
    shown = adaptory("runs", "show", "sums", "--json").json
    assert shown["state"] == "failed"
    assert "the cluster was stopped or lost its head" in shown["error"]["message"]


@pytest.mark.parametrize("field", ["tuning.rank=100000", "tuning.targets=[nope]"])
def test_what_does_not_fit_the_model_leaves_no_run(adaptory, spec, tiny_model, memory_cluster, field):
    answer = adaptory("run", spec, "--set", f"base_model={tiny_model('llama')}", "--set", field)
    assert answer.code == 2
    assert field.split("=")[0] in answer.err
    assert adaptory("runs", "list", "--json").json == []
