"""Values as people write them on a command line."""

from __future__ import annotations

import time
from datetime import datetime

import pytest
import typer

from orchestrator.commands import values


def test_durations():
    assert [values.seconds(text) for text in ("90s", "30m", "12h", "90d", "2w", "0s", "1.5h")] == [
        90,
        1800,
        43200,
        7776000,
        1209600,
        0,
        5400,
    ]


def test_moments():
    assert values.moment_of("1h") == pytest.approx(time.time() - 3600, abs=60)
    assert values.moment_of("2026-11-22") == datetime(2026, 11, 22).timestamp()
    assert values.moment_of("2026-11-22T05:10+00:00") == 1795324200


def test_limits():
    assert [values.limit(text) for text in ("0", "600", "none", "None")] == [0, 600, None, None]


@pytest.mark.parametrize(
    "text", ["", "-1", "1y", "h", "1 h", "1e3s", "\u0663s", "9" * 9 + "w", "²", "2026-13-01", "soon", "2147483648"]
)
def test_what_is_none(text: str):
    for read in (values.seconds, values.moment_of, values.limit):
        with pytest.raises(typer.BadParameter):
            read(text)
