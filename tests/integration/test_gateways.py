"""Two gateways over one PostgreSQL: limits hold over both together, and what is changed reaches both. About half a minute.

Each is a process with an engine of its own; a token of a stream takes a fiftieth of a second, so that answers last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from orchestrator.db import Database, open_database
from orchestrator.limits.quota import Quota
from orchestrator.names import QualifiedName
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import save_route
from orchestrator.tenants.keys import create_key, revoke_key
from orchestrator.tenants.tenant import add_tenant, set_quota
from orchestrator.tenants.usage import report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PLACE_SECONDS = 3.0
"""That a place outlives the gateway which gave it."""


@dataclass
class Gateways:
    db: Database
    ports: list[int]
    processes: list[subprocess.Popen[str]]
    start: Callable[[], None]
    """One more."""

    def tenant(self, name: str, **quota: int) -> str:
        """A new tenant's key."""
        add_tenant(self.db, name, Quota(**quota), actor="test")
        return create_key(self.db, name, "first", actor="test").secret

    def ask(self, gateway: int, key: str, model: str = "tiny", **fields: Any) -> requests.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2, "temperature": 0}
        return requests.post(
            f"http://127.0.0.1:{self.ports[gateway]}/v1/chat/completions",
            json=body | fields,
            headers={"Authorization": f"Bearer {key}"},
            timeout=300,
            stream=bool(fields.get("stream")),
        )

    def at_once(self, count: int, key: str, **fields: Any) -> list[requests.Response]:
        """Requests, in turn to each of the gateways."""
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda n: self.ask(n % len(self.ports), key, **fields), range(count)))


@pytest.fixture
def gateways(postgres: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> Iterator[Gateways]:
    db, model = open_database(postgres), tiny_model("llama")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")}
    command = [sys.executable, "-m", "tests.gateway_process", "--database", postgres, "--model", str(model)]
    command += ["--ttl", str(PLACE_SECONDS), "--pause", "0.02", "--no-adapters"]
    made = Gateways(db, [], [], lambda: None)

    def start(count: int = 1) -> None:
        new = []
        for number in range(count):
            home = tmp_path / f"gateway-{len(made.processes) + number}"
            new.append(
                subprocess.Popen(
                    [*command, "--home", str(home)],
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env=environment | {"OMP_NUM_THREADS": "1"},
                )
            )
        made.processes += new
        for process in new:
            assert process.stdout is not None
            made.ports.append(int(process.stdout.readline()))

    made.start = start
    try:
        start(2)
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        db.close()


def test_two_gateways_keep_one_account(gateways: Gateways):
    """All in one test, since what costs is to start them."""
    limits_hold_over_both(gateways)
    a_revoked_key_ends_at_both(gateways)
    a_changed_quota_counts_at_both(gateways)
    a_route_reaches_both(gateways)
    what_both_served_is_added_up(gateways)
    a_killed_gateways_places_come_back(gateways)


def limits_hold_over_both(gateways: Gateways) -> None:
    key = gateways.tenant("often", requests_per_minute=6)
    statuses = [response.status_code for response in gateways.at_once(16, key)]
    assert statuses.count(200) == 6, statuses
    assert statuses.count(429) == 10

    key = gateways.tenant("much", tokens_per_minute=300)
    answers = gateways.at_once(12, key, max_tokens=60)
    used = sum(a.json()["usage"]["total_tokens"] for a in answers if a.ok)
    assert 0 < used <= 300
    assert {a.status_code for a in answers} == {200, 429}

    key = gateways.tenant("together", concurrent_requests=3)
    answers = gateways.at_once(10, key, max_tokens=150, stream=True)
    assert [a.status_code for a in answers].count(200) == 3
    refused = next(a for a in answers if a.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    for answer in answers:
        assert answer.text  # to its end
    assert [a.status_code for a in gateways.at_once(3, key)] == [200] * 3


def a_revoked_key_ends_at_both(gateways: Gateways) -> None:
    key = gateways.tenant("leaving")
    assert [gateways.ask(n, key).status_code for n in (0, 1)] == [200, 200]
    revoke_key(gateways.db, "first", tenant="leaving", actor="test")
    assert [gateways.ask(n, key).status_code for n in (0, 1)] == [401, 401]


def a_changed_quota_counts_at_both(gateways: Gateways) -> None:
    key = gateways.tenant("shut")
    assert [gateways.ask(n, key).status_code for n in (0, 1)] == [200, 200]
    set_quota(gateways.db, "shut", {"requests_per_minute": 0}, actor="test")
    assert [gateways.ask(n, key).status_code for n in (0, 1)] == [429, 429]


def a_route_reaches_both(gateways: Gateways) -> None:
    key, name = gateways.tenant("acme"), QualifiedName("acme", "intents")
    assert [gateways.ask(n, key, "acme/intents").status_code for n in (0, 1)] == [404, 404]
    config = parse_config(name, {"base_model": "tiny"})
    save_route(gateways.db, name, config, actor="test", expected=0)
    changed = time.monotonic()
    missing = {0, 1}
    while missing and time.monotonic() - changed < 20:
        missing = {n for n in missing if gateways.ask(n, key, "acme/intents").status_code != 200}
    assert not missing, f"after {time.monotonic() - changed:.1f} s"


def what_both_served_is_added_up(gateways: Gateways) -> None:
    deadline = time.monotonic() + 20
    while (rows := report(gateways.db, by=("tenant",), tenant="leaving")) == [] or rows[0]["requests"] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert rows[0]["requests"] == 2


def a_killed_gateways_places_come_back(gateways: Gateways) -> None:
    key = gateways.tenant("patient", concurrent_requests=1)
    with gateways.ask(0, key, max_tokens=400, stream=True) as stream:
        lines = stream.iter_lines()
        assert json.loads(next(lines).removeprefix(b"data: "))["choices"]
        for _ in range(3):  # it lives for longer than its place would without being renewed
            assert gateways.ask(1, key).status_code == 429
            time.sleep(PLACE_SECONDS / 2)
        assert gateways.ask(1, key).status_code == 429
        gateways.processes[0].kill()
        killed = time.monotonic()
        with pytest.raises(requests.RequestException):
            for _ in lines:
                pass
    while gateways.ask(1, key).status_code != 200:
        assert time.monotonic() - killed < PLACE_SECONDS + 10
        time.sleep(0.1)
    gateways.start()  # another one takes the killed one's part
    assert gateways.ask(2, key).status_code == 200
