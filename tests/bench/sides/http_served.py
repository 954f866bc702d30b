"""The application's side of `http_overhead`: Ray Serve with the gateway and one engine, whose replica gets a core of its own.

The case comes as one line of JSON on standard input; the answer says where it listens. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from setting_up import base_digest, http_options, new_adapter

TENANT = "bench"


def main() -> None:
    case = json.loads(sys.stdin.readline())
    os.environ["ADAPTORY_HOME"] = case["home"]
    base = base_digest(Path(case["model"]))
    digests, key = registered(case, base)
    with tempfile.TemporaryDirectory(prefix="ah-", dir="/tmp") as directory:
        token = Path(directory) / "token"  # never the person's own
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        serve_until_the_end(case, base, directory, {"digests": digests, "key": key})


def serve_until_the_end(case: dict[str, Any], base: str, directory: str, facts: dict[str, Any]) -> None:
    import ray
    from ray import serve

    from serving.app import Plan, ServedModel, deploy

    options = http_options(case, base)
    names = (
        "PYTHONPATH",
        "ADAPTORY_HOME",
        "HF_HUB_OFFLINE",
        *(name for name in os.environ if name.startswith("RAY_SERVE_")),
    )
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        _temp_dir=directory,
        _system_config={"worker_niceness": 0},  # as the other side; 15 would measure what else runs on the machine
        runtime_env={"env_vars": {name: os.environ[name] for name in names if name in os.environ}},
    )
    try:
        plan = Plan(
            port=free_port(),
            models=(ServedModel(name="base", reference=case["model"]),),
            max_length=options.max_length,
            max_sequences=options.max_sequences,
            threads=options.threads,
            trusted_keys=tuple(key.decode() for key in options.trust.keys),
        )
        deploy(plan)
        pin("ServeReplica:adaptory:engine", case["core"])
        time.sleep(2)  # routes are seen within two seconds
        models = [f"{TENANT}/adapter-{n}" for n in range(case["adapters"])]
        print(
            json.dumps(facts | {"base": base, "url": f"http://{plan.host}:{plan.port}", "models": models}), flush=True
        )
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()


def pin(part: str, core: int) -> None:
    """Every thread of the one process below this one whose command line has this part."""
    (found,) = [p for p in psutil.Process().children(recursive=True) if part in " ".join(p.cmdline())]
    for thread in found.threads():
        os.sched_setaffinity(thread.id, {core})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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
