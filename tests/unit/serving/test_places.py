"""Places on a replica: floods leave some to others. Milliseconds."""

from __future__ import annotations

import contextlib

import pytest

from orchestrator.errors import EngineOverloaded
from serving.places import Places


def test_a_flood_leaves_room_for_who_comes_then_and_leaves_nothing_behind():
    places = Places(60)
    with contextlib.ExitStack() as held:
        counts = {}
        for tenant in ("a", "b", "c"):
            counts[tenant] = 0
            with contextlib.suppress(EngineOverloaded):
                while True:
                    held.enter_context(places.held(tenant))
                    counts[tenant] += 1
        assert counts == {"a": 30, "b": 15, "c": 8}
        with places.held("d"):
            pass
        with pytest.raises(EngineOverloaded, match="53 requests are here already, 30 of them"):
            held.enter_context(places.held("a"))
    assert not places._held
