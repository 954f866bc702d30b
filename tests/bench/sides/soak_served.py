"""The application's side of `soak`: what the database of its home has, with an engine whose replica gets a core of its own.

The case comes as one line of JSON on standard input; the answer says where it listens and which processes are the gateway and the
engine. It ends with its standard input.
"""

from __future__ import annotations

import json
import sys

from application import ENGINE, GATEWAY, free_port, process, serving

from orchestrator.registry.signing import Keys
from orchestrator.settings import load_settings
from serving.plan import Plan, ServedModel


def main() -> None:
    case = json.loads(sys.stdin.readline())
    plan = Plan(
        port=free_port(),
        models=(ServedModel(name="base", reference=case["model"]),),
        max_length=512,
        max_sequences=case["places"],
        max_adapters=case["slots"],
        adapter_bytes=case["adapter_bytes"],
        threads=1,
        trusted_keys=tuple(key.decode() for key in Keys.of(load_settings()).trust().keys),
    )
    with serving(plan, case["core"]):
        facts = {"port": plan.port, "gateway": process(GATEWAY).pid, "engine": process(ENGINE).pid}
        print(json.dumps(facts), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
