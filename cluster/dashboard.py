"""Plain HTTP to a Ray dashboard: the Jobs API, the packages endpoint and the node table.

Ray's own `JobSubmissionClient` imports all of Ray (0.8–1.0 s measured; requests takes 0.1 s), and a command that only
asks for a status should not pay that. The endpoints are those in Ray's openapi.yml for job submission.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from orchestrator.errors import ClusterError

TIMEOUT_SECONDS = (5.0, 60.0)
"""To connect, and between two bytes of an answer: submitting waits for the agent of the head node."""


class Dashboard:
    """One Ray dashboard and the token that opens it.

    Args:
        address: `http://host:8265`.
        token: Ray's cluster token; None for a cluster without authentication.
        token_source: where the token was looked for, for messages.

    Raises (from every method):
        ClusterError: the dashboard cannot be reached, refuses the token, or fails.
    """

    def __init__(self, address: str, token: str | None = None, *, token_source: str = "RAY_AUTH_TOKEN"):
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClusterError(
                f"{address!r} is not the address of a Ray dashboard.",
                hint="Give the Jobs API's address, as http://HOST:8265 (not ray:// and not the port 6379).",
                address=address,
            )
        self.address = f"{parts.scheme}://{parts.netloc}"
        self._token_source = token_source
        self._session = requests.Session()
        # A proxy meant for the outside must not swallow a request to this machine.
        self._session.trust_env = not _loopback(parts.hostname)
        # As an `auth`, since a header alone would be replaced by what ~/.netrc has for this host.
        self._session.auth = _Bearer(token) if token else None

    def get(self, path: str, **query: Any) -> requests.Response:
        """GET; the caller looks at 404 itself."""
        return self._request("GET", path, params=query)

    def post(self, path: str, body: Any = None) -> requests.Response:
        """POST; the caller looks at the status itself, as Ray answers 500 to much that is no failure of its own."""
        return self._request("POST", path, json=body, tolerate_500=True)

    def put(self, path: str, data: bytes) -> requests.Response:
        return self._request("PUT", path, data=data)

    def delete(self, path: str) -> requests.Response:
        return self._request("DELETE", path, tolerate_500=True)

    def version(self) -> dict[str, str]:
        """`{"ray_version", "ray_commit", "session_name", …}`; the quickest proof that the cluster answers."""
        return self.get("/api/version").json()

    def nodes(self) -> list[dict[str, Any]]:
        """Alive nodes as the state API gives them: `node_id`, `node_ip`, `resources_total`, …"""
        answer = self.get("/api/v0/nodes", detail=1, limit=10_000).json()
        rows = ((answer.get("data") or {}).get("result") or {}).get("result") or []
        return [row for row in rows if row.get("state") == "ALIVE"]

    def close(self) -> None:
        self._session.close()

    def _request(self, method: str, path: str, *, tolerate_500: bool = False, **options: Any) -> requests.Response:
        url = self.address + path
        try:
            answer = self._session.request(method, url, timeout=TIMEOUT_SECONDS, **options)
        except requests.RequestException as error:
            raise ClusterError(
                f"Ray at {self.address} cannot be reached ({type(error).__name__}).",
                hint="Check that the cluster runs and that this machine reaches its dashboard port "
                "(`kubectl port-forward svc/…-head-svc 8265` for KubeRay), or unset ADAPTORY_RAY_ADDRESS to run here.",
                address=self.address,
            ) from error
        if answer.status_code in (401, 403):
            raise ClusterError(
                f"Ray at {self.address} refuses the token from {self._token_source} (HTTP {answer.status_code}).",
                hint="Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token.",
                address=self.address,
            )
        if answer.status_code >= 500 and not tolerate_500:
            raise ClusterError(
                f"Ray at {self.address} failed at {method} {path}: {last_line(answer.text)}",
                hint="Look at the head node's dashboard log.",
                address=self.address,
            )
        return answer


class _Bearer(requests.auth.AuthBase):
    def __init__(self, token: str):
        self._header = f"Bearer {token}"

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = self._header
        return request


def ray_token() -> tuple[str | None, str]:
    """The token for a remote cluster, and where it came from: Ray's own three places, in Ray's order.

    Raises:
        ClusterError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(named).expanduser().read_text().strip(), named
        except OSError as error:
            raise ClusterError(
                f"RAY_AUTH_TOKEN_PATH={named}: the token cannot be read ({error.strerror}).",
                hint="Point it at the file that holds the cluster's token.",
            ) from error
    default = Path("~/.ray/auth_token").expanduser()
    if default.is_file():
        return default.read_text().strip() or None, str(default)
    return None, "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token (nothing there)"


def last_line(text: str) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no message"


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
