"""`adaptory chat`: a conversation with a served model, in the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands.backend import Backend
from orchestrator.commands.output import Json, print_json, say
from orchestrator.errors import AdaptoryError, ClusterError

if TYPE_CHECKING:
    from requests import Response

KEY_VARIABLE, URL_VARIABLE = "ADAPTORY_API_KEY", "ADAPTORY_API_URL"
_KEY_SECONDS = 24 * 3600.0


class ChatRefused(AdaptoryError):
    """The endpoint did not answer. Context: `status`, `code`."""

    code = "chat_refused"


def register(app: typer.Typer) -> None:
    app.command("chat", epilog='Example: adaptory chat acme/intents --message "Book me a flight to Rome"')(chat)


def chat(
    model: Annotated[
        str, typer.Argument(help="A route (acme/intents), one version (acme/intents@3), or a base model.")
    ],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this, print the answer, and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0: always the likeliest words.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer.")] = None,
    url: Annotated[str | None, typer.Option(envvar=URL_VARIABLE, help="Default: what runs here.")] = None,
    as_json: Json = False,
) -> None:
    """Talk to a served model; an empty line or Ctrl-D ends it.

    The key is taken from ADAPTORY_API_KEY. Without it, and with the database at hand, one is made for the conversation and
    revoked after it.
    """
    backend = Backend()
    options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
    body = {name: value for name, value in options.items() if value is not None}
    messages = [{"role": "system", "content": system}] if system else []
    endpoint = url or _endpoint(backend)
    with _key(backend, model) as key:
        if message is not None or as_json:
            messages.append({"role": "user", "content": message if message is not None else _read("")})
            if as_json:
                print_json(_ask(endpoint, key, body | {"messages": messages}).json())
            else:
                _say_answer(endpoint, key, body | {"messages": messages})
            return
        while text := _read("> "):
            messages.append({"role": "user", "content": text})
            try:
                messages.append(
                    {"role": "assistant", "content": _say_answer(endpoint, key, body | {"messages": messages})}
                )
            except KeyboardInterrupt:  # ends the answer, not the conversation
                typer.echo()
                messages.pop()


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def _endpoint(backend: Backend) -> str:
    import cluster
    from cluster import serving as cluster_serving
    from orchestrator.commands.serving import APPLICATION

    client = cluster.connect_if_running(backend.settings)
    found = cluster_serving.find(client.dashboard, APPLICATION) if client is not None else None
    if found is None or not found.running:
        raise ClusterError(
            "Nothing is served here.", hint=f"`adaptory up` starts it; or name an endpoint in {URL_VARIABLE}."
        )
    return found.url


@contextlib.contextmanager
def _key(backend: Backend, model: str) -> Iterator[str]:
    if given := os.environ.get(KEY_VARIABLE):
        yield given
        return
    from orchestrator.tenants.keys import create_key, revoke_key
    from orchestrator.tenants.tenant import get_tenant

    owner, slash, _ = model.partition("/")
    tenants = [owner] if slash else []
    tenant = next((t for t in tenants if _exists(backend, t)), backend.settings.tenant)
    get_tenant(backend.db, tenant)
    name = f"chat-{secrets.token_hex(4)}"
    issued = create_key(backend.db, tenant, name, actor=backend.actor, lifetime=_KEY_SECONDS)
    try:
        yield issued.secret
    finally:
        revoke_key(backend.db, issued.key.id, actor=backend.actor)


def _exists(backend: Backend, tenant: str) -> bool:
    from orchestrator.tenants.tenant import list_tenants

    return any(each.name == tenant for each in list_tenants(backend.db))


def _say_answer(endpoint: str, key: str, body: dict[str, Any]) -> str:
    """Print an answer as it comes; returns it."""
    with _ask(endpoint, key, body | {"stream": True}) as response:
        if response.headers.get("x-adaptory-fallback") == "true":
            say(f"(a fallback answers: {response.headers.get('x-adaptory-adapter')})")
        texts: list[str] = []
        for line in response.iter_lines():
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                typer.echo()
                raise _refused(chunk["error"], 200)
            text = chunk["choices"][0]["delta"].get("content") or ""
            typer.echo(text, nl=False)
            texts.append(text)
    typer.echo()
    return "".join(texts)


def _ask(endpoint: str, key: str, body: dict[str, Any]) -> Response:
    import requests

    session = requests.Session()
    session.trust_env = False  # neither a proxy nor ~/.netrc has a say between this machine and its own endpoint
    try:
        response = session.post(
            f"{endpoint.rstrip('/')}/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {key}"},
            stream=bool(body.get("stream")),
            timeout=(5.0, 600.0),
        )
    except requests.RequestException as error:
        raise ClusterError(
            f"{endpoint} does not answer ({type(error).__name__}).",
            hint="`adaptory status` says what runs.",
            url=endpoint,
        ) from error
    if response.status_code == 200:
        return response
    try:
        found = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        found = {"message": response.text[:300] or "no message", "code": None}
    raise _refused(found, response.status_code)


def _refused(error: dict[str, Any], status: int) -> ChatRefused:
    return ChatRefused(str(error.get("message")), status=status, code_of_endpoint=error.get("code"))
