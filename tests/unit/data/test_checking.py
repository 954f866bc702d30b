"""What happens to data before submission: found, checked, stored; and the commands over it. About three seconds."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.data import check, preview, resolve
from jobs.data.catalogue import EVALS, example_rows
from orchestrator.commands.data import app
from orchestrator.errors import DataError
from orchestrator.spec.job import DataSpec
from orchestrator.spec.resolved import RemoteData, StoredFile
from orchestrator.store import Store, file_path

Write = Callable[..., Path]
PAIRS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(10)]


def test_check_counts_each_split(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", [*PAIRS, PAIRS[0]])
    write("test.json", json.dumps([{"input": "q1", "ideal": "a1"}, {"input": "new", "ideal": "a"}]))
    report = check(DataSpec(train="train.jsonl", validation=0.0, test="test.json"), tmp_path)
    assert (report.format, report.train.rows, report.train.duplicates) == ("prompt_completion", 11, 1)
    assert report.validation is None
    assert report.test is not None
    assert (report.test.format, report.test.rows, report.test.in_train) == ("input_ideal", 2, 1)


def test_check_and_prepare_split_alike(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    from jobs.data import prepare

    write("train.jsonl", PAIRS)
    spec, store = DataSpec(train="train.jsonl", validation=0.3), Store(str(tmp_path / "store"))
    checked = check(spec, tmp_path)
    data = resolve(spec, store=store, base_dir=tmp_path)
    done = prepare(data, spec, tokenizer=tokenizer, max_length=100, store=store, cache=tmp_path / "cache")
    assert checked.validation is not None
    assert (checked.train.rows, checked.validation.rows) == (len(done.train), len(done.validation or []))


def test_check_names_the_line_of_a_later_file(write: Write, tmp_path: Path) -> None:
    write("data/a.jsonl", PAIRS)
    write("data/b.jsonl", [*PAIRS[:4], {"prompt": "q"}])
    with pytest.raises(DataError, match=r"data/b\.jsonl:5: the row has no answer"):
        check(DataSpec(train="data/*.jsonl"), tmp_path)


@pytest.mark.parametrize(("fraction", "warned"), [(0.3, False), (0.9, True)])
def test_more_rows_to_measure_on_than_to_learn_from(
    write: Write, tmp_path: Path, fraction: float, warned: bool
) -> None:
    write("train.jsonl", PAIRS)
    report = check(DataSpec(train="train.jsonl", validation=fraction), tmp_path)
    assert bool(report.warnings()) == warned


def test_a_timestamp_that_parquet_holds_where_a_template_writes_text(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet

    tools = [{"name": "f", "since": datetime.datetime(2026, 1, 2)}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = pa.Table.from_pylist([{"messages": messages, "tools": None}, {"messages": messages, "tools": tools}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:2: tools\[0\]\.function\.since is datetime") as caught:
        check(DataSpec(train="a.parquet"), tmp_path)
    assert caught.value.context["field"] == "tools[0].function.since"


def test_test_rows_need_an_answer(write: Write, tmp_path: Path) -> None:
    write("train.txt", "some text\n")
    with pytest.raises(DataError, match=r"train\.txt:1: plain text has no question"):
        check(DataSpec(train="train.txt", test="train.txt"), tmp_path)


def test_remote_data_is_left_to_the_job_unless_asked_for(s3: str, tmp_path: Path) -> None:
    """Three seconds, for the S3 server, if nothing started it before."""
    spec = DataSpec(train=f"{s3}/train.jsonl", validation=0.0)
    assert check(spec, tmp_path).unchecked == [f"{s3}/train.jsonl"]
    with pytest.raises(DataError, match="no data file at"):
        check(spec, tmp_path, remote=True)
    Store(s3).fs.pipe_file(f"{s3.removeprefix('s3://')}/train.jsonl", json.dumps(PAIRS[0]).encode())
    assert check(spec, tmp_path, remote=True).train.rows == 1


def test_s3_without_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"train\.jsonl cannot be read: Unable to locate credentials") as caught:
        check(DataSpec(train=f"{s3}/train.jsonl", validation=0.0), remote=True)
    assert "AWS_*" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("trian.jsonl", "There is no file trian.jsonl", "Did you mean train.jsonl?"),
        ("other/a.jsonl", "There is no file other/a.jsonl", "There is no directory"),
        ("zzz.csv", "There is no file zzz.csv", "Check the path"),
        ("*.parquet", "No file matches *.parquet", "Check the pattern"),
        ("empty", "The directory empty holds no data file", "Put .jsonl"),
        ("gs://bucket/a.jsonl", "gs:// is none of the places", "s3://BUCKET/KEY, hf:NAME and example:NAME/SPLIT"),
        ("https://x.org/a.jsonl", "https:// is none of the places", "Download it"),
        ("loop.jsonl", "There is no file loop.jsonl", "It is a link to loop.jsonl, which leads to no file"),
        ("x" * 300, "cannot be read: File name too long", ""),
        (" ", "A path of the data is empty", "Name a file"),
        ("model.bin", "files ending in '.bin' are not read", "Convert it"),
    ],
)
def test_what_is_not_there(write: Write, tmp_path: Path, reference: str, message: str, hint: str) -> None:
    write("train.jsonl", PAIRS)
    write("model.bin", "x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for action in (check, lambda spec, base: resolve(spec, store=Store(str(tmp_path / "store")), base_dir=base)):
        with pytest.raises(DataError) as caught:
            action(DataSpec(train=reference, validation=0.0), tmp_path)
        assert message in caught.value.message
        assert hint in str(caught.value.hint)


def test_resolve_stores_files_under_their_digest(write: Write, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    path = write("data/train.jsonl", PAIRS)
    spec = DataSpec(train=["data/train.jsonl", "hf:org/set:train", "s3://b/c.csv"], validation="data", test=str(path))
    data = resolve(spec, store=store, base_dir=tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    stored = StoredFile(name="data/train.jsonl", sha256=digest, size=path.stat().st_size)
    assert data.train == [stored, RemoteData(uri="hf:org/set:train"), RemoteData(uri="s3://b/c.csv")]
    assert data.validation == [stored]
    assert data.test == [stored.model_copy(update={"name": str(path)})]
    assert store.read(file_path(digest)) == path.read_bytes()


def test_checking_imports_nothing_heavy(write: Write, tmp_path: Path) -> None:
    path = write("train.jsonl", PAIRS)
    code = (
        "import sys; from jobs.data import check; from orchestrator.spec.job import DataSpec\n"
        f"assert check(DataSpec(train={str(path)!r})).train.rows\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- examples -------------------------------------------------------------------------------------------------------


@pytest.fixture
def evals_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the real package: 80 sentences with entities, one without, laid out and named as it is."""
    site = tmp_path / "site"
    samples = site / "evals/registry/data/ner_finance/samples.jsonl"
    samples.parent.mkdir(parents=True)
    rows = [(f"Lender {n} , Inc. pays .", f"[Lender {n}, Inc. - ORGANIZATION, Ada - PERSON]") for n in range(80)]
    rows.append(("Nothing here .", "No entities found"))
    lines = [{"input": [{"content": "…"}, {"content": sentence}], "ideal": ideal} for sentence, ideal in rows]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    name, version = EVALS.split("==")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("evals/registry/data/ner_finance/samples.jsonl,,\n")
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.usefixtures("evals_package")
def test_example_rows(tmp_path: Path) -> None:
    train = [row for row, _ in example_rows("finance-entities/train", tmp_path)]
    test = [row for row, _ in example_rows("finance-entities/test", tmp_path)]
    assert (len(train), len(test)) == (20, 60)
    system, user, answer = test[0]["messages"]
    assert system == {"role": "system", "content": "Extract the named entities as JSON."}
    number = user["content"].split()[1]
    assert json.loads(answer["content"]) == {"organization": [f"Lender {number}, Inc."], "person": ["Ada"]}
    asked = [row["messages"][1]["content"] for row in train + test]
    assert len(set(asked)) == 80
    assert test == [row for row, _ in example_rows("finance-entities/test", tmp_path)]
    report = check(DataSpec(train="example:finance-entities/train", test="example:finance-entities/test"))
    assert report.test is not None
    assert (report.test.rows, report.test.in_train, report.format) == (60, 0, "chat")


@pytest.mark.parametrize("name", ["finance-entities", "nothing/train", "finance-entities/other"])
def test_unknown_examples_list_the_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(example_rows(name, tmp_path))
    assert "example:finance-entities/train" in str(caught.value.hint)


# --- preview and commands -------------------------------------------------------------------------------------------


def test_preview_tells_what_carries_loss(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    write("train.jsonl", PAIRS)
    spec = DataSpec(train="train.jsonl", system="Be brief.")
    first, second = preview(spec, tokenizer=tokenizer, rows=2, base_dir=tmp_path)
    assert (first.where, second.where, first.format) == ("train.jsonl:1", "train.jsonl:2", "prompt_completion")
    assert [(piece.text, piece.loss) for piece in first.pieces] == [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n", False),
        ("a0<|im_end|>", True),
        ("\n", False),
    ]
    assert first.tokens == sum(piece.tokens or 0 for piece in first.pieces)
    assert first.labelled_tokens == first.pieces[1].tokens
    (plain,) = preview(spec, rows=1, base_dir=tmp_path)
    assert [piece.text for piece in plain.pieces if piece.loss] == ["a0\n"]


def test_commands(write: Write, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = write("train.jsonl", PAIRS), tiny_model("llama")
    monkeypatch.chdir(path.parent)
    write("job.yaml", f"name: a\nbase_model: {model}\ndata: {{train: train.jsonl, validation: 0.3}}\n")
    runner = CliRunner()

    def said(*arguments: str) -> str:
        result = runner.invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert json.loads(said("check", "train.jsonl", "--json"))["train"]["rows"] == 10
    table = said("check", "job.yaml")
    assert "prompt_completion" in table
    assert "validation" in table
    rows = json.loads(said("preview", "job.yaml", "-n", "2", "--json"))
    assert [row["where"] for row in rows] == ["train.jsonl:1", "train.jsonl:2"]
    assert [piece["text"] for piece in rows[0]["pieces"] if piece["loss"]] == ["a0<|im_end|>"]
    assert "⟦a0<|im_end|>⟧" in said("preview", "train.jsonl", "--model", str(model), "-n", "1")
    assert "assistant: ⟦a0" in said("preview", "train.jsonl", "-n", "1")
    with pytest.raises(DataError, match=r"no file gone\.jsonl"):
        said("check", "gone.jsonl")
    with pytest.raises(DataError, match="name of the data is empty"):
        said("check", "")
