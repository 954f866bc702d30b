"""Users are shared out by weight, stay where they are, and move only when a weight makes them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from orchestrator.routing.choosing import choose

USERS = [f"user-{number}" for number in range(20_000)]


def counts(arms: list[tuple[str, int]], route: str = "acme/intents") -> list[float]:
    found = Counter(choose(route, user, arms) for user in USERS)
    return [found[index] / len(USERS) for index in range(len(arms))]


@pytest.mark.parametrize("weights", [(1, 1), (90, 10), (99, 1), (1, 2, 3), (5, 5, 5, 5, 80)])
def test_shares_follow_the_weights(weights: tuple[int, ...]):
    """Within five standard deviations of 20,000 draws."""
    arms = [(f"acme/intents@{number}", weight) for number, weight in enumerate(weights, 1)]
    for share, weight in zip(counts(arms), weights, strict=True):
        expected = weight / sum(weights)
        assert share == pytest.approx(expected, abs=5 * (expected * (1 - expected) / len(USERS)) ** 0.5)


def test_requests_of_nobody_are_shared_out_too_and_not_sticky():
    arms = [("a@1", 3), ("a@2", 1)]
    found = [choose("acme/a", None, arms) for _ in range(4_000)]
    assert sum(found) / len(found) == pytest.approx(0.25, abs=0.035)


def test_a_user_stays_in_every_process():
    """A constant of the hash, seen by another interpreter with another hash seed: a restart moves nobody."""
    arms = [("acme/intents@production", 90), ("acme/intents@4", 10)]
    mine = [choose("acme/intents", user, arms) for user in USERS[:50]]
    code = (
        "from orchestrator.routing.choosing import choose\n"
        f"print([choose('acme/intents', f'user-{{n}}', {arms!r}) for n in range(50)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(mine)
    assert [choose("acme/intents", user, arms[::-1]) for user in USERS[:50]] == [1 - each for each in mine]


def test_a_growing_weight_takes_users_and_moves_nobody_else():
    before, after = [("a", 50), ("b", 40), ("c", 10)], [("a", 50), ("b", 40), ("c", 30)]
    moved = [(choose("r", user, before), choose("r", user, after)) for user in USERS]
    assert {to for was, to in moved if was != to} == {2}
    assert sum(was != to for was, to in moved) / len(USERS) == pytest.approx(30 / 120 - 10 / 100, abs=0.02)


def test_a_removed_arm_moves_only_its_own_users():
    before, after = [("a", 1), ("b", 1), ("c", 1)], [("a", 1), ("b", 1)]
    for user in USERS[:2_000]:
        was = choose("r", user, before)
        if was != 2:
            assert choose("r", user, after) == was


def test_routes_draw_independently():
    arms = [("a", 1), ("b", 1)]
    same = sum(choose("acme/x", user, arms) == choose("acme/y", user, arms) for user in USERS)
    assert same / len(USERS) == pytest.approx(0.5, abs=0.02)
    assert 0 < sum(choose("ab", "c" + u, arms) != choose("abc", u, arms) for u in USERS[:200]) < 200


def test_odd_users():
    for user in ("", "\ud800", "x" * 100_000, "ü\0"):
        assert choose("r", user, [("a", 1), ("b", 1)]) in (0, 1)
