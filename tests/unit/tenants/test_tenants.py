"""Tenants and their quotas, on both kinds of database."""

from __future__ import annotations

import threading

import pytest

from orchestrator.db import Database
from orchestrator.errors import InvalidName, TenantExists, TenantNotFound
from orchestrator.limits.quota import Quota
from orchestrator.tenants import tenant as tenants


def test_add_show_set(db: Database):
    made = tenants.add_tenant(db, "acme", Quota(requests_per_minute=60), actor="ada")
    assert tenants.get_tenant(db, "acme") == made
    changed = tenants.set_quota(db, "acme", {"tokens_per_minute": 1000, "requests_per_minute": None}, actor="ada")
    assert changed.quota == Quota(tokens_per_minute=1000)
    tenants.add_tenant(db, "abc", Quota(), actor="ada")
    assert [(each.name, each.quota) for each in tenants.list_tenants(db)] == [
        ("abc", Quota()),
        ("acme", Quota(tokens_per_minute=1000)),
    ]


def test_a_taken_name_and_an_unknown_one(db: Database):
    tenants.add_tenant(db, "acme", Quota(), actor="ada")
    with pytest.raises(TenantExists, match="adaptory tenants set acme"):
        tenants.add_tenant(db, "acme", Quota(requests_per_minute=1), actor="ada")
    assert tenants.get_tenant(db, "acme").quota == Quota()
    with pytest.raises(TenantNotFound, match="Did you mean acme"):
        tenants.get_tenant(db, "acne")
    with pytest.raises(TenantNotFound):
        tenants.set_quota(db, "zzz", {"requests_per_minute": 1}, actor="ada")
    with pytest.raises(InvalidName):
        tenants.add_tenant(db, "Acme Inc", Quota(), actor="ada")


def test_ensuring_keeps_what_is_there(db: Database):
    tenants.add_tenant(db, "acme", Quota(requests_per_minute=5), actor="ada")
    assert tenants.ensure_tenant(db, "acme", actor="ada").quota.requests_per_minute == 5
    assert tenants.ensure_tenant(db, "new", actor="ada").quota == Quota()


def test_one_of_many_adds_wins_and_no_change_of_another_limit_is_lost(db: Database):
    barrier, added = threading.Barrier(6), []
    limits = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")

    def compete(number: int) -> None:
        barrier.wait()
        try:
            tenants.add_tenant(db, "acme", Quota(), actor=str(number))
            added.append(number)
        except TenantExists:
            pass
        barrier.wait()
        tenants.set_quota(db, "acme", {limits[number % 3]: 7}, actor=str(number))

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added) == 1
    assert tenants.get_tenant(db, "acme").quota == Quota.model_validate(dict.fromkeys(limits, 7))


def test_every_change_is_reported_once(db: Database, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple] = []
    monkeypatch.setattr(tenants, "changed", lambda session, *what, **states: seen.append((*what, states)))
    tenants.add_tenant(db, "acme", Quota(), actor="ada")
    tenants.ensure_tenant(db, "acme", actor="ada")
    tenants.set_quota(db, "acme", {"requests_per_minute": 9}, actor="bob")
    tenants.set_quota(db, "acme", {"requests_per_minute": 9}, actor="bob")
    assert [entry[:3] for entry in seen] == [("ada", "tenant.add", "acme"), ("bob", "tenant.set", "acme")]
    states = seen[1][3]
    assert (states["before"]["requests_per_minute"], states["after"]["requests_per_minute"]) == (None, 9)
