"""The application's side of `http_overhead`: Ray Serve with the gateway and one engine, whose replica gets a core of its own.

The case comes as one line of JSON on standard input; the answer says where it listens. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from application import free_port, serving
from setting_up import base_digest, http_options, new_adapter

from serving.plan import Plan, ServedModel

TENANT = "bench"


def main() -> None:
    case = json.loads(sys.stdin.readline())
    os.environ["ADAPTORY_HOME"] = case["home"]
    base = base_digest(Path(case["model"]))
    digests, key = registered(case, base)
    options = http_options(case, base)
    plan = Plan(
        port=free_port(),
        models=(ServedModel(name="base", reference=case["model"]),),
        max_length=options.max_length,
        max_sequences=options.max_sequences,
        threads=options.threads,
        trusted_keys=tuple(key.decode() for key in options.trust.keys),
    )
    models = [f"{TENANT}/adapter-{n}" for n in range(case["adapters"])]
    with serving(plan, case["core"]) as url:
        print(json.dumps({"digests": digests, "key": key, "base": base, "url": url, "models": models}), flush=True)
        sys.stdin.read()


def registered(case: dict[str, Any], base: str) -> tuple[list[str], str]:
    """Signed adapters in the store with a route each, and a tenant's key; what is there already is kept."""
    from orchestrator.db import open_database
    from orchestrator.limits.quota import Quota
    from orchestrator.names import QualifiedName
    from orchestrator.registry.importing import import_adapter
    from orchestrator.registry.signing import Keys
    from orchestrator.registry.versions import Reference
    from orchestrator.routing.config import parse_config
    from orchestrator.routing.repository import save_route
    from orchestrator.settings import load_settings
    from orchestrator.store import Store
    from orchestrator.tenants.keys import create_key
    from orchestrator.tenants.tenant import add_tenant

    settings, listing = load_settings(), Path(case["home"]) / f"{base}.json"
    if listing.exists():
        known = json.loads(listing.read_text())
        return known["digests"], known["key"]
    settings.home.mkdir(parents=True, exist_ok=True)
    db, digests = open_database(settings.database), []
    add_tenant(db, TENANT, Quota(), actor="bench")
    for number in range(case["adapters"]):
        name = f"adapter-{number}"
        version = import_adapter(
            db,
            Store(settings.store),
            new_adapter(Path(case["model"]), case["rank"], number, settings.home / "new"),
            Reference(tenant=TENANT, name=name),
            keys=Keys.of(settings),
            actor="bench",
            cache=settings.cache,
            max_rank=settings.max_rank,
            base=case["model"],
        )
        digests.append(version.digest)
        route = QualifiedName(TENANT, name)
        config = parse_config(route, {"adapters": [{"adapter": f"{TENANT}/{name}@{version.digest}"}]})
        save_route(db, route, config, actor="bench", expected=0)
    key = create_key(db, TENANT, "bench", actor="bench").secret
    db.close()
    listing.write_text(json.dumps({"digests": digests, "key": key}))
    return digests, key


if __name__ == "__main__":
    main()
