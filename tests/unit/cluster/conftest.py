"""A dashboard that answers as Ray 2.60's does (tests/integration has a real one), without Ray. Instant."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster.dashboard import Dashboard
from cluster.jobs import RayJobClient

TOKEN = "the-token"


class FakeRay:
    """Jobs, packages and nodes in memory."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cpus = 2.0
        self.hide_next_status = False
        """Answer the next question for a job with 404, as if another submitter came in between."""
        self.address = ""
        self.serve: dict[str, Any] = {}
        """Of Ray Serve: empty, or what it says of itself."""
        self.drain_fails = ""
        """What a job that drains it prints before it fails."""
        self.serving_fails = ""
        """What a job that deploys it prints last before it fails."""

    def client(self, *, local: bool = True, token: str = TOKEN) -> RayJobClient:
        return RayJobClient(Dashboard(self.address, token, token_source="RAY_AUTH_TOKEN"), local=local)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        parts = path.split("?")[0].strip("/").split("/")
        match method, parts:
            case "GET", ["api", "version"]:
                return 200, {"ray_version": "2.60.0", "session_name": "session_x"}
            case "GET", ["api", "v0", "nodes"]:
                total = {"CPU": self.cpus, "memory": 4e9}
                rows = [
                    {"node_id": "a", "node_ip": "127.0.0.1", "state": "ALIVE", "resources_total": total},
                    {"node_id": "b", "node_ip": "10.0.0.9", "state": "DEAD", "resources_total": {"CPU": 64.0}},
                ]
                return 200, {"result": True, "data": {"result": {"result": rows}}}
            case "GET", ["api", "packages", "gcs", name]:
                return (200, {}) if name in self.packages else (404, "no such package")
            case "PUT", ["api", "packages", "gcs", name]:
                self.packages[name] = body
                return 200, {}
            case "GET", ["api", "serve", "applications"]:
                return 200, self.serve
            case "DELETE", ["api", "serve", "applications"]:
                self.serve = {}
                return 200, {}
            case "GET", ["api", "jobs"]:
                return 200, list(self.jobs.values())
            case "POST", ["api", "jobs"]:
                return self._submit(json.loads(body))
            case "GET", ["api", "jobs", job]:
                if self.hide_next_status:
                    self.hide_next_status = False
                    return 404, "does not exist"
                return (200, self.jobs[job]) if job in self.jobs else (404, "does not exist")
            case "GET", ["api", "jobs", job, "logs"]:
                return (200, {"logs": self.jobs[job].get("logs", "")}) if job in self.jobs else (404, "")
            case "POST", ["api", "jobs", job, "stop"]:
                if job not in self.jobs:
                    return 404, "does not exist"
                self.jobs[job]["status"] = "STOPPED"
                return 200, {"stopped": True}
        return 404, "no such route"

    def _submit(self, request: dict[str, Any]) -> tuple[int, Any]:
        name = request["submission_id"]
        if name in self.jobs:
            return 500, f"Traceback …\nValueError: Job with submission_id {name} already exists."
        if "broken" in name:
            return 500, "Traceback …\nRuntimeError: the agent is away"
        self.jobs[name] = request | {"status": "PENDING", "message": "waiting"}
        if "-m serving --plan" in request["entrypoint"]:
            self._deploy(name, json.loads(shlex.split(request["entrypoint"])[-1]))
        if "-m serving --drain" in request["entrypoint"]:
            self.jobs[name] |= {"status": "FAILED" if self.drain_fails else "SUCCEEDED", "logs": self.drain_fails}
        return 200, {"submission_id": name}

    def _deploy(self, job: str, plan: dict[str, Any]) -> None:
        if self.serving_fails:
            self.jobs[job] |= {"status": "FAILED", "logs": f"serving: fetching\n{self.serving_fails}\n"}
            return
        self.jobs[job] |= {"status": "SUCCEEDED", "logs": "serving: It serves.\n", "end_time": len(self.jobs)}
        deployments = {
            name: {
                "name": name,
                "status": "HEALTHY",
                "message": "",
                "replicas": [{"replica_id": f"{name}-r1", "state": "RUNNING"}],
            }
            for name in ("gateway", "engine-0")
        }
        self.serve = {
            "http_options": {"host": "127.0.0.1", "port": plan["port"]},
            "applications": {"adaptory": {"status": "RUNNING", "message": "", "deployments": deployments}},
        }


@pytest.fixture
def fake_ray() -> Iterator[FakeRay]:
    ray = FakeRay()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            ray.requests.append(f"{self.command} {self.path}")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, answer = 401, "Unauthorized: Missing authentication token"
            else:
                status, answer = ray.answer(self.command, self.path, body)
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _any

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    ray.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield ray
    server.shutdown()
    server.server_close()
    thread.join()
