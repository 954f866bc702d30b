"""From resolved data to tokenised rows on disk: counts, limits, cache, several processes. About eight seconds."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.data import PreparedData, prepare, resolve
from orchestrator.errors import CorruptObject, DataError, ObjectMissing, StoreError
from orchestrator.spec.job import DataSpec
from orchestrator.spec.resolved import RemoteData, ResolvedData
from orchestrator.store import Store, file_path

Write = Callable[..., Path]


def pair(number: int, words: int = 1) -> dict[str, str]:
    return {"prompt": f"What is the capital of land {number}?", "completion": "city " * words + f"{number}."}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def run(store: Store, tmp_path: Path, tokenizer: Any) -> Callable[..., PreparedData]:
    """`run(spec)` → what `prepare` gives for it, through the store and a cache of this test."""

    def go(spec: DataSpec, **options: Any) -> PreparedData:
        options = {"tokenizer": tokenizer, "max_length": 200, "store": store, "cache": tmp_path / "cache"} | options
        return prepare(resolve(spec, store=store, base_dir=tmp_path), spec, **options)

    return go


def texts(rows: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(rows[i].ids) for i in range(len(rows))]


def test_rows_split_and_report(run: Any, write: Write, tokenizer: Any) -> None:
    write("train.jsonl", [*(pair(n) for n in range(600)), pair(0)])
    write("test.jsonl", [pair(0), pair(10_000)])
    seen: list[int] = []
    done = run(DataSpec(train="train.jsonl", validation=0.2, test="test.jsonl"), progress=seen.append)
    assert seen == [256, 512, 601, 603]
    report = done.report
    assert report.format == "prompt_completion"
    assert report.train.rows + report.validation.rows == 601
    assert report.train.duplicates + report.validation.duplicates == 1
    assert (len(done.train), len(done.validation)) == (report.train.examples, report.validation.examples)
    assert 80 < len(done.validation) < 160
    assert not set(texts(done.train, tokenizer)) & set(texts(done.validation, tokenizer))
    assert done.test[1].messages == [{"role": "user", "content": "What is the capital of land 10000?"}]
    assert (done.test[1].answer, done.test[1].tools) == ("city 10000.", None)
    assert (report.test.rows, report.test.in_train) == (2, 1)
    assert set(report.sources) == {"train.jsonl", "test.jsonl"}
    for rows, split in ((done.train, report.train), (done.validation, report.validation)):
        every = [rows[i] for i in range(len(rows))]
        assert rows.lengths.tolist() == [len(tokens.ids) for tokens in every]
        assert rows.labelled.tolist() == [int(tokens.loss_mask[1:].sum()) for tokens in every]
        assert rows.lengths.dtype == rows.labelled.dtype == np.int32
        assert split.tokens == rows.lengths.sum()
        assert split.labelled_tokens == rows.labelled.sum()
        assert (split.max_length, split.mean_length) == (rows.lengths.max(), round(rows.lengths.mean(), 1))
    tokens = done.train[-1]
    assert tokens.loss_mask[-1]
    tokens.ids[0] = 3  # a copy: the file is not written to
    assert done.train[-1].ids[0] != 3
    with pytest.raises(IndexError):
        done.train[len(done.train)]


def test_rows_pickle_as_their_place(run: Any, write: Write, tokenizer: Any) -> None:
    write("train.jsonl", [pair(n) for n in range(50)])
    train = run(DataSpec(train="train.jsonl", validation=0.5)).train
    again = pickle.loads(pickle.dumps(train))  # noqa: S301 - our own bytes
    assert texts(again, tokenizer) == texts(train, tokenizer)


def test_validation_file_and_several_train_files(run: Any, write: Write) -> None:
    write("parts/a.jsonl", [pair(1), pair(2)])
    write("parts/b.csv", "prompt,completion\nq,a\n")
    write("parts/.hidden.jsonl", "broken")
    write("held.json", json.dumps([pair(2), pair(3)]))
    done = run(DataSpec(train="parts", validation="held.json"))
    assert (len(done.train), len(done.validation), done.test) == (3, 2, [])
    assert done.report.validation.in_train == 1
    assert set(done.report.sources) == {"parts/a.jsonl", "parts/b.csv", "held.json"}
    none = run(DataSpec(train=["parts/*.jsonl", "held.json"], validation=0.0))
    assert (len(none.train), none.validation, none.report.validation) == (4, None, None)
    assert none.report.train.duplicates == 1


def test_limit_counts_rows_before_the_split(run: Any, write: Write) -> None:
    write("train.jsonl", [*(pair(n) for n in range(20)), {"prompt": "no answer, but behind the limit"}])
    report = run(DataSpec(train="train.jsonl", validation=0.3, limit=20)).report
    assert report.train.rows + report.validation.rows == 20


def test_mixed_formats_across_files(run: Any, write: Write) -> None:
    write("a.jsonl", [pair(1)])
    write("b.jsonl", [{"text": "t"}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: mixed formats: this row is text"):
        run(DataSpec(train=["a.jsonl", "b.jsonl"], validation=0.0))


def test_too_long_rows_are_dropped_cut_or_refused_and_counted(run: Any, write: Write, tokenizer: Any) -> None:
    long = pair(2, words=300)
    write("train.jsonl", [pair(1), long, pair(3)])
    dropped = run(DataSpec(train="train.jsonl", validation=0.0))
    assert (len(dropped.train), dropped.report.train.dropped, dropped.report.train.truncated) == (2, 1, 0)
    cut = run(DataSpec(train="train.jsonl", validation=0.0, too_long="truncate"))
    assert cut.train.lengths.max() == 200
    assert (len(cut.train), cut.report.train.dropped, cut.report.train.truncated) == (3, 0, 1)
    with pytest.raises(DataError, match=r"train\.jsonl:2: the row has \d+ tokens, more than max_length 200") as caught:
        run(DataSpec(train="train.jsonl", validation=0.0, too_long="error"))
    assert caught.value.context["line"] == 2


def test_nothing_is_left(run: Any, write: Write) -> None:
    write("train.jsonl", [pair(1), pair(2)])
    with pytest.raises(
        DataError, match=r"Every row of train\.jsonl is longer than max_length 8 tokens \(the longest has"
    ):
        run(DataSpec(train="train.jsonl"), max_length=8)
    with pytest.raises(DataError, match=r"All tokens of train\.jsonl are masked"):
        run(DataSpec(train="train.jsonl", too_long="truncate"), max_length=8)
    assert (
        run(DataSpec(train="train.jsonl", validation=0.0)).report.train.examples == 2
    )  # a failure leaves nothing behind


def test_tail_that_no_target_sees_is_not_kept(run: Any, write: Write, tokenizer: Any) -> None:
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write("train.jsonl", [{"messages": [*turn, {"role": "user", "content": "r"}, turn[1] | {"weight": 0}]}])
    (text,) = texts(run(DataSpec(train="train.jsonl", validation=0.0)).train, tokenizer)
    assert text.endswith("assistant\na<|im_end|>")


def test_system_message_of_the_spec(run: Any, write: Write, tokenizer: Any) -> None:
    write("train.jsonl", [pair(1)])
    write("test.jsonl", [pair(2)])
    done = run(DataSpec(train="train.jsonl", validation=0.0, test="test.jsonl", system="Be brief."))
    assert texts(done.train, tokenizer)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert done.test[0].messages[0] == {"role": "system", "content": "Be brief."}


def test_second_call_reads_the_cache_and_options_make_another(
    run: Any, write: Write, monkeypatch: Any, make_tokenizer: Any
) -> None:
    write("train.jsonl", [pair(n) for n in range(10)])
    spec = DataSpec(train="train.jsonl")
    first = run(spec)
    calls: list[int] = []
    monkeypatch.setattr("jobs.data.tokenise.Tokeniser.fill", lambda *_: calls.append(1))
    again = run(spec, progress=calls.append)
    assert calls == []
    assert again.report == first.report
    assert again.train.lengths.tolist() == first.train.lengths.tolist()
    for changed in ({"max_length": 100}, {"tokenizer": make_tokenizer("marked")}):
        with pytest.raises(FileNotFoundError):  # fill does nothing now, so there is nothing to open
            run(spec, **changed)
    for other in ({"too_long": "truncate"}, {"system": "s"}, {"limit": 3}, {"validation": 0.5}):
        with pytest.raises(FileNotFoundError):
            run(spec.model_copy(update=other))
    write("train.jsonl", [pair(n) for n in range(11)])
    with pytest.raises(FileNotFoundError):
        run(spec)
    assert len(calls) == 7


def test_interrupted_work_leaves_nothing_behind(run: Any, write: Write, tmp_path: Path) -> None:
    write("train.jsonl", [pair(n) for n in range(300)])

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(DataSpec(train="train.jsonl"), progress=interrupt)
    assert [p for p in (tmp_path / "cache/tokens").iterdir() if p.is_dir()] == []
    assert run(DataSpec(train="train.jsonl")).report.train.rows > 200


def _prepare_and_count(data: ResolvedData, spec: DataSpec, tokenizer: Any, store: str, cache: Path, out: Any) -> None:
    calls: list[int] = []
    done = prepare(
        data, spec, tokenizer=tokenizer, max_length=200, store=Store(store), cache=cache, progress=calls.append
    )
    out.put((len(calls), len(done.train), done.report.model_dump_json()))


def test_two_processes_share_the_work(store: Store, write: Write, tmp_path: Path, tokenizer: Any) -> None:
    write("train.jsonl", [pair(n) for n in range(3000)])
    spec = DataSpec(train="train.jsonl")
    data = resolve(spec, store=store, base_dir=tmp_path)
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    arguments = (data, spec, tokenizer, store.url, tmp_path / "cache", out)
    processes = [context.Process(target=_prepare_and_count, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    results = [out.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(calls for calls, _, _ in results) == [0, 12]  # one did all batches, the other none
    assert results[0][1:] == results[1][1:]
    assert [p for p in (tmp_path / "cache/tokens").iterdir() if p.name.startswith(".tmp-")] == []


def test_stored_bytes_are_checked(run: Any, store: Store, write: Write, tmp_path: Path, tokenizer: Any) -> None:
    write("train.jsonl", [pair(1)])
    spec = DataSpec(train="train.jsonl", validation=0.0)
    data = resolve(spec, store=store, base_dir=tmp_path)
    options = {"tokenizer": tokenizer, "max_length": 200, "store": store, "cache": tmp_path / "cache"}
    (tmp_path / "store" / file_path(data.train[0].sha256)).write_text(json.dumps(pair(2)))  # type: ignore[union-attr]
    with pytest.raises(CorruptObject, match=r"train\.jsonl does not have its digest"):
        prepare(data, spec, **options)
    store.delete(file_path(data.train[0].sha256))  # type: ignore[union-attr]
    with pytest.raises(ObjectMissing):
        prepare(data, spec, **options)


def test_a_cache_that_cannot_be_written(run: Any, write: Write, tmp_path: Path) -> None:
    write("train.jsonl", [pair(1)])
    write("occupied", "a file, where the cache should be")
    with pytest.raises(StoreError, match=r"occupied.* cannot be written"):
        run(DataSpec(train="train.jsonl", validation=0.0), cache=tmp_path / "occupied")


def test_data_and_store_on_s3(s3: str, write: Write, tmp_path: Path, tokenizer: Any) -> None:
    """Three seconds, for the S3 server."""
    store = Store(s3)
    local = write("train.jsonl", [pair(n) for n in range(30)])
    store.fs.put_file(str(local), f"{s3.removeprefix('s3://')}/data/a.jsonl")
    write("held.csv", "prompt,completion\nq,a\n")
    spec = DataSpec(train=f"{s3}/data/*.jsonl", validation="held.csv")
    data = resolve(spec, store=store, base_dir=tmp_path)
    assert data.train == [RemoteData(uri=f"{s3}/data/*.jsonl")]
    options = {"tokenizer": tokenizer, "max_length": 200, "store": store, "cache": tmp_path / "cache"}
    done = prepare(data, spec, **options)
    assert (len(done.train), len(done.validation or [])) == (30, 1)
    store.fs.pipe_file(f"{s3.removeprefix('s3://')}/data/b.jsonl", json.dumps(pair(99)).encode())
    assert len(prepare(data, spec, **options).train) == 31  # other bytes are other data
    missing = ResolvedData(train=[RemoteData(uri=f"{s3}/nothing.jsonl")], validation=0.0)
    with pytest.raises(DataError, match=r"no data file at .*nothing\.jsonl"):
        prepare(missing, spec, **options)


def test_hub_data_sets(write: Write, store: Store, tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    """`datasets` takes a local directory for a name, so no network is needed."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    write("hub/train.jsonl", [pair(n) for n in range(8)])
    write("hub/test.jsonl", [pair(n) for n in range(8, 10)])
    spec = DataSpec(train=f"hf:{tmp_path}/hub", validation=0.0, test=f"hf:{tmp_path}/hub:test")
    data = resolve(spec, store=store)
    done = prepare(data, spec, tokenizer=tokenizer, max_length=200, store=store, cache=tmp_path / "cache")
    assert (len(done.train), len(done.test)) == (8, 2)
    for uri, message in ((f"hf:{tmp_path}/nowhere", "cannot be loaded"), ("hf:a:b:c:d", "no data set reference")):
        wrong = ResolvedData(train=[RemoteData(uri=uri)], validation=0.0)
        with pytest.raises(DataError, match=message):
            prepare(wrong, spec, tokenizer=tokenizer, max_length=200, store=store, cache=tmp_path / "cache")
