"""How a packed sweep's driver ends its workers. Without Ray; about three seconds, nearly all of it imports."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from jobs.sweep import packed_driver
from jobs.sweep.packed_driver import _Group


class Workers:
    """End when they are told to."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def run(self, broker: Any) -> str:
        assert self.told.wait(30)
        return "ended"


def test_the_end_is_said_until_the_workers_have_heard_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a broker that is starting again, then to one that is killed before it could hand it over, then to one that does."""
    workers, said = Workers(), []

    def get(end: Any) -> None:
        said.append(end)
        if len(said) == 1:
            raise ray.exceptions.ActorUnavailableError("starting", None)
        if len(said) == 3:
            workers.told.set()

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(packed_driver, "SAID_AGAIN_SECONDS", 0.01)
    broker = SimpleNamespace(finish=SimpleNamespace(remote=lambda *end: end))
    with _Group(workers, broker) as group:  # type: ignore[arg-type]
        assert group.finish("t01", {"best": "t01"}) == "ended"
    assert said[:3] == [("t01", {"best": "t01"})] * 3
