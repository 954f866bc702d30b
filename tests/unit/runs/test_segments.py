"""Events and logs through the store: order, restarts, a store that is away. About 1 s."""

from __future__ import annotations

import logging
import threading

import pytest

from orchestrator.errors import StoreError
from orchestrator.runs.events import EventWriter, read_events
from orchestrator.runs.logs import StoreLogHandler, read_logs
from orchestrator.runs.segments import SegmentWriter, list_segments
from orchestrator.store import Store, segment_path


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def test_events_come_back_in_order_and_once(store):
    writer = EventWriter(store, "r", 1, "driver", interval=60)
    for step in range(3):
        writer.emit("metrics", step=step)
        writer.flush()
    seen: set[str] = set()
    assert [event.data["step"] for event in read_events(store, "r", seen=seen)] == [0, 1, 2]
    writer.emit("message", "bye", level="warn")
    writer.close()
    (last,) = read_events(store, "r", seen=seen)
    assert (last.message, last.level, last.type) == ("bye", "warn", "message")


def test_a_restarted_writer_goes_on_behind_its_segments(store):
    for _ in range(3):
        writer = EventWriter(store, "r", 1, "driver", interval=60)
        writer.emit("message", "hello")
        writer.close()
    ids = [event.id for event in read_events(store, "r")]
    assert ids == ["a1-driver-0", "a1-driver-1000000", "a1-driver-2000000"]


def test_a_writer_whose_name_begins_like_another_is_another(store):
    for name in ("rank1", "rank1-eval", "rank10"):
        writer = EventWriter(store, "r", 1, name, interval=60)
        writer.emit("message", name)
        writer.close()
    assert sorted(list_segments(store, "r", "events")) == [(1, "rank1"), (1, "rank1-eval"), (1, "rank10")]
    assert len(list(read_events(store, "r"))) == 3


def test_only_one_attempt(store):
    for attempt in (1, 2, 10):
        writer = EventWriter(store, "r", attempt, "driver", interval=60)
        writer.emit("message", str(attempt))
        writer.close()
    assert [event.message for event in read_events(store, "r", attempt=1)] == ["1"]
    assert [event.message for event in read_events(store, "r")] == ["1", "2", "10"]


def test_a_store_that_is_away_loses_nothing(store, monkeypatch):
    write, away = store.write, [True]

    def flaky(path, data):
        if away[0]:
            raise StoreError("away")
        write(path, data)

    monkeypatch.setattr(store, "write", flaky)
    writer = EventWriter(store, "r", 1, "driver", interval=60)
    writer.emit("message", "first")
    writer.flush()
    writer.emit("message", "second")
    assert list(read_events(store, "r")) == []
    away[0] = False
    writer.close()
    assert [event.message for event in read_events(store, "r")] == ["first", "second"]


def test_many_threads_lose_and_repeat_nothing(store):
    writer = EventWriter(store, "r", 1, "driver", interval=0.001)

    def work(number: int) -> None:
        for step in range(50):
            writer.emit("metrics", thread=number, step=step)
            writer.flush()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    events = list(read_events(store, "r"))
    assert len({event.id for event in events}) == len(events) == 400
    assert {(e.data["thread"], e.data["step"]) for e in events} == {(t, s) for t in range(8) for s in range(50)}


def test_a_line_that_cannot_be_read_hides_no_other(store, caplog):
    writer = EventWriter(store, "r", 1, "driver", interval=60)
    writer.emit("message", "good")
    writer.close()
    good = store.read(segment_path("r", "events", 1, "driver", 0))
    store.write(segment_path("r", "events", 1, "driver", 1), b"{broken\n" + good)
    assert [event.message for event in read_events(store, "r")] == ["good", "good"]
    assert "a1-driver-000001.jsonl:1 is not a line of Event" in caplog.text


def test_logs_of_several_writers_are_merged_by_time(store):
    handlers = [StoreLogHandler(store, "r", 1, name, interval=60) for name in ("driver", "rank0")]
    for number, seconds in enumerate([10.0, 11.0, 12.0, 13.0]):
        record = logging.LogRecord("jobs.train", logging.WARNING, "f", 1, "line %d of été", (number,), None)
        record.created = seconds
        handlers[number % 2].emit(record)
        if number == 1:
            handlers[0]._segments.flush()
    for handler in handlers:
        handler.close()
    lines = list(read_logs(store, "r"))
    assert [line.message for line in lines] == [f"line {n} of été" for n in range(4)]
    assert [line.writer for line in lines] == ["driver", "rank0", "driver", "rank0"]
    assert lines[0].level == "warning"
    assert list(read_logs(store, "r", attempt=2)) == []


def test_logs_with_seen_give_what_is_new(store):
    handler = StoreLogHandler(store, "r", 1, "driver", interval=60)
    logger, seen = logging.Logger("jobs"), set()
    logger.addHandler(handler)
    logger.info("one")
    handler._segments.flush()
    assert [line.message for line in read_logs(store, "r", seen=seen)] == ["one"]
    assert list(read_logs(store, "r", seen=seen)) == []
    try:
        raise ValueError("boom")
    except ValueError:
        logger.exception("two")
    handler.close()
    (line,) = read_logs(store, "r", seen=seen)
    assert line.message.startswith("two\nTraceback")


def test_a_store_that_is_away_is_not_logged_into_itself(store, monkeypatch):
    def away(path, data):
        raise StoreError("away")

    handler = StoreLogHandler(store, "r", 1, "driver", interval=60)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(store, "write", away)
            logging.getLogger("jobs").warning("mine")
            for _ in range(3):
                handler._segments.flush()
    finally:
        root.removeHandler(handler)
        handler.close()
    assert [line.message for line in read_logs(store, "r")] == ["mine"]


def test_closing_ends_the_thread(store):
    writer = SegmentWriter(store, "r", "logs", 1, "driver", interval=60)
    writer.close()
    assert not writer._thread.is_alive()
    assert store.list("runs/r") == []
