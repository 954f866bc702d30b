"""API keys: who gets in, until when, and that no secret is left anywhere. On both kinds of database."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update

from orchestrator.db import Database
from orchestrator.db.models import ApiKeyRow
from orchestrator.errors import (
    AdaptoryError,
    ApiKeyError,
    ApiKeyExists,
    ApiKeyNotFound,
    ApiKeyRefused,
    InvalidName,
    ScopeMissing,
    TenantNotFound,
)
from orchestrator.limits.quota import Quota
from orchestrator.tenants import keys, secrets
from orchestrator.tenants.keys import IssuedKey, KeyState, Scope
from orchestrator.tenants.tenant import add_tenant, set_quota

DAY = 86400.0


@pytest.fixture(autouse=True)
def tenants(db: Database) -> None:
    for name in ("acme", "globex"):
        add_tenant(db, name, Quota(), actor="test")


@pytest.fixture
def create(db: Database) -> Callable[..., IssuedKey]:
    def make(name: str = "ci", tenant: str = "acme", **options: Any) -> IssuedKey:
        return keys.create_key(db, tenant, name, actor="ada", **options)

    return make


def end(db: Database, issued: IssuedKey, at: float) -> None:
    with db.write() as session:
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == issued.key.id).values(expires_at=at))


# --- who gets in ----------------------------------------------------------------------------------------------------


def test_a_key_says_who_asks(db: Database, create: Callable[..., IssuedKey]):
    issued = create(scopes=[Scope.ADMIN, Scope.INFERENCE])
    set_quota(db, "acme", {"requests_per_minute": 30}, actor="ada")
    who = keys.authenticate(db, issued.secret)
    assert (who.tenant.name, who.tenant.quota.requests_per_minute) == ("acme", 30)
    assert (who.key_id, who.key_name, who.scopes) == (issued.key.id, "ci", {Scope.ADMIN, Scope.INFERENCE})


def test_scopes(db: Database, create: Callable[..., IssuedKey]):
    asks, steers = create("a"), create("b", scopes=[Scope.ADMIN])
    keys.authenticate(db, asks.secret).require(Scope.INFERENCE)
    with pytest.raises(ScopeMissing) as caught:
        keys.authenticate(db, asks.secret).require(Scope.ADMIN)
    assert caught.value.context["scope"] == "admin"
    with pytest.raises(ScopeMissing):  # neither contains the other
        keys.authenticate(db, steers.secret).require(Scope.INFERENCE)


def test_guesses_are_all_answered_alike(db: Database, create: Callable[..., IssuedKey]):
    """An id that exists, one that does not and a revoked one: nobody without the secret can tell them apart."""
    alive, dead = create("a"), create("b")
    keys.revoke_key(db, dead.key.id, actor="ada")
    wrong, said = "A" * 43, set()
    for key_id in (alive.key.id, dead.key.id, "a" * 12):
        with pytest.raises(ApiKeyRefused) as caught:
            keys.authenticate(db, f"ak-{key_id}-{wrong}")
        said.add(str(caught.value.to_dict()))
    assert len(said) == 1
    for text in ("", "x", alive.secret[:-1], alive.secret + "A", alive.key.id, "Bearer " + alive.secret, "\ud800" * 59):
        with pytest.raises(ApiKeyRefused):
            keys.authenticate(db, text)


def test_one_keys_secret_does_not_open_anothers_id(db: Database, create: Callable[..., IssuedKey]):
    mine, other = create("a"), create("b", tenant="globex")
    with pytest.raises(ApiKeyRefused):
        keys.authenticate(db, f"ak-{other.key.id}-{mine.secret[-43:]}")


def test_each_answer_compares_a_whole_hash(
    db: Database, create: Callable[..., IssuedKey], monkeypatch: pytest.MonkeyPatch
):
    """Also for an id that is not there: else its absence shows in the time that an answer takes."""
    compared: list[tuple[int, int]] = []

    def compare(one: str, two: str) -> bool:
        compared.append((len(one), len(two)))
        return one == two

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys.authenticate(db, create().secret)
    with pytest.raises(ApiKeyRefused):
        keys.authenticate(db, "ak-" + "a" * 12 + "-" + "A" * 43)
    assert compared == [(64, 64)] * 2


# --- until when -----------------------------------------------------------------------------------------------------


def test_expiry(db: Database, create: Callable[..., IssuedKey]):
    issued = create(lifetime=DAY)
    assert issued.key.expires_at == pytest.approx(time.time() + DAY, abs=60)
    keys.authenticate(db, issued.secret)
    end(db, issued, time.time() - 1)
    with pytest.raises(ApiKeyRefused) as refused:
        keys.authenticate(db, issued.secret)
    assert refused.value.context["state"] == "expired"
    assert keys.list_keys(db)[0].state() is KeyState.EXPIRED


def test_revoked_at_once_and_for_good(db: Database, create: Callable[..., IssuedKey]):
    issued = create()
    keys.authenticate(db, issued.secret)
    first = keys.revoke_key(db, "ci", tenant="acme", actor="ada")
    with pytest.raises(ApiKeyRefused) as refused:
        keys.authenticate(db, issued.secret)
    assert refused.value.context["state"] == "revoked"
    assert keys.revoke_key(db, issued.key.id, actor="bob") == first
    with pytest.raises(ApiKeyError, match="revoked already"):
        keys.rotate_key(db, issued.key.id, grace=0, actor="ada")
    assert create().key.id != issued.key.id, "its name is free again"


def test_rotation_with_a_grace_period(db: Database, create: Callable[..., IssuedKey]):
    old = create(scopes=[Scope.ADMIN], lifetime=90 * DAY)
    new = keys.rotate_key(db, "ci", grace=DAY, actor="bob")
    assert (new.key.tenant, new.key.name, new.key.scopes) == ("acme", "ci", (Scope.ADMIN,))
    assert new.key.expires_at == pytest.approx(time.time() + 90 * DAY, abs=60)
    assert keys.authenticate(db, old.secret).key_id == old.key.id
    assert keys.authenticate(db, new.secret).key_id == new.key.id
    listed = {key.id: key for key in keys.list_keys(db, tenant="acme")}
    assert (listed[old.key.id].state(), listed[old.key.id].replaced_by) == (KeyState.ROTATED, new.key.id)
    assert listed[old.key.id].expires_at == pytest.approx(time.time() + DAY, abs=60)
    assert listed[old.key.id].state(time.time() + DAY + 60) is KeyState.EXPIRED
    with pytest.raises(ApiKeyError, match=f"replaced by ak-{new.key.id}"):
        keys.rotate_key(db, old.key.id, grace=DAY, actor="bob")
    keys.revoke_key(db, old.key.id, actor="bob")  # the grace period can be cut short
    with pytest.raises(ApiKeyRefused) as refused:
        keys.authenticate(db, old.secret)
    assert refused.value.context["state"] == "revoked"


def test_a_grace_period_never_makes_a_key_live_longer(db: Database, create: Callable[..., IssuedKey]):
    old = create(lifetime=60)
    keys.rotate_key(db, old.key.id, grace=DAY, actor="bob")
    assert {key.id: key for key in keys.list_keys(db)}[old.key.id].expires_at == old.key.expires_at
    now = create("other")
    keys.rotate_key(db, now.key.id, grace=0, actor="bob")
    with pytest.raises(ApiKeyRefused) as refused:
        keys.authenticate(db, now.secret)
    assert refused.value.context["state"] == "expired"


# --- names ----------------------------------------------------------------------------------------------------------


def test_names(db: Database, create: Callable[..., IssuedKey]):
    create(), create(tenant="globex")
    with pytest.raises(ApiKeyExists, match="has a key ci already"):
        create()
    with pytest.raises(InvalidName):
        create("My Key")
    with pytest.raises(TenantNotFound):
        create(tenant="nobody")
    with pytest.raises(ApiKeyNotFound, match="Several tenants"):
        keys.revoke_key(db, "ci", actor="ada")
    with pytest.raises(ApiKeyNotFound, match="of tenant acme"):
        keys.revoke_key(db, "xx", tenant="acme", actor="ada")


def test_another_tenants_key_is_not_found_by_its_id(db: Database, create: Callable[..., IssuedKey]):
    issued = create(tenant="globex")
    with pytest.raises(ApiKeyNotFound):
        keys.revoke_key(db, issued.key.id, tenant="acme", actor="ada")
    keys.authenticate(db, issued.secret)


# --- races ----------------------------------------------------------------------------------------------------------


def race(*work: Callable[[], Any]) -> list[Any]:
    """What each returned or raised, started together."""
    barrier, results = threading.Barrier(len(work)), []

    def run(each: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results.append(each())
        except AdaptoryError as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(work), "one died of an error that is not ours"
    return results


def test_one_of_many_keys_gets_the_name(db: Database, create: Callable[..., IssuedKey]):
    results = race(*[create] * 6)
    assert sorted(type(result).__name__ for result in results) == ["ApiKeyExists"] * 5 + ["IssuedKey"]


@pytest.mark.parametrize("by", ["id", "name"])
def test_one_of_many_rotations_wins(db: Database, create: Callable[..., IssuedKey], by: str):
    old = create()
    reference = old.key.id if by == "id" else "ci"
    # By name, a later one may find the new key and rotate that: a chain, in which each key is replaced once.
    results = race(*[lambda: keys.rotate_key(db, reference, grace=DAY, tenant="acme", actor="ada")] * 5)
    issued = [result for result in results if isinstance(result, IssuedKey)]
    assert len(issued) >= 1 if by == "name" else len(issued) == 1
    listed = keys.list_keys(db)
    assert len(listed) == 1 + len(issued)
    assert [key.state() for key in listed].count(KeyState.ACTIVE) == 1
    replaced = [key.replaced_by for key in listed if key.replaced_by]
    assert len(replaced) == len(set(replaced)) == len(issued)
    for result in issued:
        keys.authenticate(db, result.secret)


def test_a_revocation_beside_a_rotation_holds(db: Database, create: Callable[..., IssuedKey]):
    for number in range(4):
        old = create(f"k{number}")
        race(
            lambda old=old: keys.rotate_key(db, old.key.id, grace=DAY, actor="ada"),
            lambda old=old: keys.revoke_key(db, old.key.id, actor="bob"),
        )
        with pytest.raises(ApiKeyRefused) as refused:
            keys.authenticate(db, old.secret)
        assert refused.value.context["state"] == "revoked"


# --- secrets stay secret --------------------------------------------------------------------------------------------


def test_no_secret_is_left_anywhere(db: Database, create: Callable[..., IssuedKey], caplog: pytest.LogCaptureFixture):
    """Neither in the database, nor in logs (SQL with its parameters too), nor in an error, a repr or a pickle of one."""
    for engine in (db.engine, db._writer, db._reader):
        engine.echo = "debug"  # type: ignore[attr-defined]
    caplog.set_level(logging.DEBUG)
    first = create()
    second = keys.rotate_key(db, first.secret, grace=DAY, actor="ada")
    shown = [repr(first), str(second), repr(keys.authenticate(db, first.secret)), repr(keys.list_keys(db))]
    keys.revoke_key(db, second.secret, actor="ada")
    unknown = first.secret.replace(first.key.id, "a" * 12)
    for act in (
        lambda: keys.authenticate(db, second.secret),
        lambda: keys.authenticate(db, unknown),
        lambda: keys.authenticate(db, first.secret + "A"),
        lambda: keys.rotate_key(db, second.secret, grace=1, actor="ada"),
        lambda: keys.revoke_key(db, unknown, actor="ada"),
        lambda: create(second.secret),
        lambda: keys.list_keys(db, tenant=first.secret),
        lambda: create(),
        lambda: create(),
    ):
        try:
            act()
        except AdaptoryError as error:
            shown += [str(error), repr(error), str(error.to_dict()), str(error.args), repr(pickle.dumps(error))]
            shown += [repr(error.__cause__)]
    with db.read() as session:
        shown += [str(vars(row)) for row in session.scalars(select(ApiKeyRow))]
    shown.append(caplog.text)
    everything = "\n".join(shown)
    for part in (caplog.text, "\n".join(shown[:-1])):
        assert first.key.id in part
    assert secrets.hash_key(first.secret) in caplog.text, "the log has SQL's parameters"
    for issued in (first, second):
        assert issued.secret[-43:] not in everything
        assert issued.secret[-43:-3] not in everything


def test_the_audit_gets_no_secret_and_no_hash(
    db: Database, create: Callable[..., IssuedKey], monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple] = []
    monkeypatch.setattr(keys, "changed", lambda session, *what, **states: seen.append((*what, states)))
    first = create()
    second = keys.rotate_key(db, "ci", grace=1, actor="bob")
    keys.revoke_key(db, second.key.id, actor="eve")
    keys.revoke_key(db, second.key.id, actor="eve")
    assert [entry[:3] for entry in seen] == [
        ("ada", "key.create", first.key.id),
        ("bob", "key.rotate", first.key.id),
        ("eve", "key.revoke", second.key.id),
    ]
    for issued in (first, second):
        assert issued.secret[-43:] not in str(seen)
        assert secrets.hash_key(issued.secret) not in str(seen)
