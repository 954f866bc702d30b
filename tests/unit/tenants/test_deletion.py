"""A tenant is deleted only when nothing is lost with it. On both kinds of database."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from orchestrator.db import Database
from orchestrator.db.audit import entries
from orchestrator.errors import TenantInUse, TenantNotFound
from orchestrator.limits.quota import Quota
from orchestrator.limits.shared import SharedLimiter
from orchestrator.names import QualifiedName
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import delete_route, rollback, save_route
from orchestrator.tenants.deletion import delete_tenant
from orchestrator.tenants.keys import create_key, list_keys, revoke_key
from orchestrator.tenants.tenant import add_tenant, get_tenant, list_tenants
from orchestrator.tenants.usage import UsageWriter, report

ROUTE = QualifiedName("acme", "intents")


@pytest.fixture
def acme(db: Database) -> None:
    for name in ("acme", "globex"):
        add_tenant(db, name, Quota(tokens_per_minute=600), actor="ada")
        create_key(db, name, "laptop", actor="ada")


def owned(db: Database, **options: bool) -> dict[str, int]:
    with pytest.raises(TenantInUse) as caught:
        delete_tenant(db, "acme", actor="ada", **options)
    assert caught.value.hint
    return caught.value.context["owns"]


def test_everything_it_owns_is_named_and_goes_step_by_step(db: Database, acme: None):
    save_route(db, ROUTE, parse_config(ROUTE, {"base_model": "tiny"}), actor="ada", expected=0)
    expired = create_key(db, "acme", "old", actor="ada", lifetime=0.01)
    limiter, usage = SharedLimiter(db), UsageWriter(db)
    running = limiter.reserve("acme", Quota(), 100)
    usage.add("acme", "acme/intents", None, tokens_in=3, tokens_out=4)
    usage.flush()
    time.sleep(0.02)
    assert owned(db) == {"routes": 1, "keys": 1, "requests being answered": 1, "hours of usage": 1}
    delete_route(db, ROUTE, actor="ada")
    for key in list_keys(db, tenant="acme"):
        if key.id != expired.key.id:
            revoke_key(db, key.id, actor="ada")
    limiter.settle(running, 7)
    assert owned(db) == {"hours of usage": 1}
    assert delete_tenant(db, "acme", actor="ada", forget_usage=True).name == "acme"
    assert [tenant.name for tenant in list_tenants(db)] == ["globex"]
    assert [key.tenant for key in list_keys(db)] == ["globex"]
    (last, *_) = entries(db, subject="acme")
    assert (last.action, last.actor, last.after) == ("tenant.delete", "ada", None)
    assert (last.before["quota"]["tokens_per_minute"], last.before["hours_of_usage"]) == (600, 1)
    add_tenant(db, "acme", Quota(), actor="ada")
    assert list_keys(db, tenant="acme") == []
    with pytest.raises(Exception, match="There is no route acme/intents"):
        rollback(db, ROUTE, actor="ada")


def test_adapters_keep_their_tenant(db: Database, acme: None, register_adapter: Callable[..., None]):
    register_adapter(db, "acme/intents", "sha256:" + "1" * 64, "sha256:" + "b" * 64)
    assert owned(db, forget_usage=True) == {"keys": 1, "adapters": 1, "versions of adapters": 1}
    with pytest.raises(TenantInUse, match=r"adapters \(1\)") as caught:
        delete_tenant(db, "acme", actor="ada")
    assert "adaptory tenants disable acme" in (caught.value.hint or "")
    assert get_tenant(db, "acme")


def test_what_a_deleted_tenant_used_last_spoils_nobody_elses_usage(db: Database, acme: None):
    """A gateway stores usage some seconds after it was used, all tenants' together."""
    usage = UsageWriter(db)
    for tenant in ("acme", "globex"):
        usage.add(tenant, "tiny", None, tokens_in=1, tokens_out=1)
    revoke_key(db, "laptop", tenant="acme", actor="ada")
    delete_tenant(db, "acme", actor="ada")
    usage.flush()
    assert [row["tenant"] for row in report(db)] == ["globex"]
    with pytest.raises(TenantNotFound):
        delete_tenant(db, "acme", actor="ada")
