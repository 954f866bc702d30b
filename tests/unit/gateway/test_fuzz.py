"""What nobody would send, against the gateway over a real engine: never a 5xx, never an answer that is not written down.

schemathesis makes requests from the gateway's own OpenAPI document, right and wrong ones; hypothesis puts any JSON anywhere.
Always the same requests. About 30 seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from orchestrator.db import open_database
from orchestrator.limits.quota import Quota
from orchestrator.names import QualifiedName
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import save_route
from orchestrator.tenants.keys import create_key
from orchestrator.tenants.tenant import add_tenant
from serving.gateway.app import create_app
from serving.gateway.openapi import document
from serving.gateway.requests import ChatRequest, CompletionRequest
from tests.gateway_process import BASE, gateway, replica, served

pytestmark = pytest.mark.slow

LONGEST = 64
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
DOCUMENTED = {
    path: set(map(int, ways["post"]["responses"])) for path, ways in document()["paths"].items() if "post" in ways
}
SAME_ALWAYS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=80,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Endpoint:
    url: str
    key: str
    engine: Any

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def post(self, path: str, data: bytes, **headers: str) -> requests.Response:
        return requests.post(self.url + path, data=data, headers=self.headers | headers, timeout=600)

    def works(self) -> None:
        """The engine, too: nothing that was sent has hurt it, or whoever was in the same batch."""
        body = {"model": BASE, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
        assert self.post("/v1/chat/completions", json.dumps(body).encode()).status_code == 200
        assert self.engine.engine.stats().failed_steps == 0


@pytest.fixture(scope="module")
def endpoint(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home, model = tmp_path_factory.mktemp("fuzz"), tiny_model("llama")
    database = f"sqlite:///{home / 'state.db'}"
    db = open_database(database)
    add_tenant(db, "acme", Quota(), actor="test")
    key, name = create_key(db, "acme", "first", actor="test").secret, QualifiedName("acme", "intents")
    save_route(db, name, parse_config(name, {"base_model": BASE}), actor="test", expected=0)
    db.close()
    engine = replica(model, home, max_length=LONGEST, threads=1)
    with gateway(database, model, engine) as made, served(create_app(made)) as port:
        yield Endpoint(f"http://127.0.0.1:{port}", key, engine)


def sound(response: requests.Response, path: str) -> None:
    """A documented status, and OpenAI's form of an error."""
    assert response.status_code in DOCUMENTED[path], response.text
    assert response.status_code < 500, response.text
    assert response.headers["x-request-id"].startswith("req-")
    if response.status_code != 200:
        error = response.json()
        assert set(error) == {"error"}
        assert set(error["error"]) == {"message", "type", "param", "code"}
        assert isinstance(error["error"]["message"], str)
        assert len(response.content) < 5000, "an error is no echo"


# --- from the document ----------------------------------------------------------------------------------------------

schema = schemathesis.openapi.from_dict(document())


@schema.hook
def map_body(context: Any, body: Any) -> Any:
    """Half of the bodies name a model that is there, or they would get no further."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 2:
        return body | {"model": BASE}
    return body


@schema.parametrize()
@SAME_ALWAYS
def test_every_answer_is_as_the_document_says(case: Any, endpoint: Endpoint):
    response = case.call(base_url=endpoint.url, headers=endpoint.headers)
    if response.status_code != 405:  # a method that the document does not know
        case.validate_response(response, checks=CHECKS)


def test_nothing_of_it_has_hurt_the_engine(endpoint: Endpoint):
    endpoint.works()


def test_the_document_is_served_and_names_every_field(endpoint: Endpoint):
    served = requests.get(endpoint.url + "/openapi.json", timeout=30).json()
    assert served == document()
    for kind in (ChatRequest, CompletionRequest):
        assert set(kind.model_fields) <= set(served["components"]["schemas"][kind.__name__]["properties"])


# --- any JSON anywhere ----------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 1e-300, 1e300, -0.0, float("nan"), float("inf")]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(["", "\ud800", "\x00", "acme/intents", BASE, "\u202e", "a" * 5000])
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": BASE, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 3},
    "/v1/completions": {"model": BASE, "prompt": "Who", "max_tokens": 3},
}
FIELDS = {
    "/v1/chat/completions": sorted(ChatRequest.model_fields),
    "/v1/completions": sorted(CompletionRequest.model_fields),
}


@SAME_ALWAYS
@given(st.data())
def test_any_value_in_any_field(endpoint: Endpoint, data: st.DataObject):
    path = data.draw(st.sampled_from(sorted(VALID)))
    body = VALID[path] | data.draw(st.dictionaries(st.sampled_from(FIELDS[path]), ANYTHING, min_size=1, max_size=3))
    if body["max_tokens"] == 3 and "stream" in body and data.draw(st.booleans()):
        body["stream"] = True
    sound(endpoint.post(path, json.dumps(body).encode()), path)


@SAME_ALWAYS
@given(
    sampling=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.one_of(st.floats(0, 2), st.just(5e-324)),
            "top_p": st.one_of(st.floats(0, 1, exclude_min=True), st.just(5e-324)),
            "top_k": st.one_of(st.integers(0, 400), st.just(10**30)),
            "seed": st.integers(-(2**63), 2**63 - 1),
            "max_tokens": st.one_of(st.integers(1, 5), st.just(10**30)),
            "stop": st.lists(st.text(min_size=1, max_size=5), max_size=16),
        },
    ),
    prompt=st.one_of(
        st.text(min_size=1, max_size=30, alphabet=st.characters(exclude_categories=["Cs"])),
        st.lists(st.integers(0, 319), min_size=1, max_size=20),
    ),
)
def test_whatever_may_be_asked_for_is_answered(endpoint: Endpoint, sampling: dict[str, Any], prompt: Any):
    """All within the bounds that the document gives: each is answered, whatever the corner."""
    response = endpoint.post("/v1/completions", json.dumps({"model": BASE, "prompt": prompt} | sampling).encode())
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == 1


def test_no_corner_of_it_has_hurt_the_engine(endpoint: Endpoint):
    endpoint.works()


# --- odd JSON, and what is none -------------------------------------------------------------------------------------

CHAT = VALID["/v1/chat/completions"]
TEXT = json.dumps(CHAT)
ODD: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a text": b'"x"',
    "two objects": (TEXT + TEXT).encode(),
    "cut": TEXT.encode()[:-3],
    "deep lists": b'{"metadata":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep and valid": TEXT.encode()[:-1] + b',"metadata":' + b"[" * 500 + b"]" * 500 + b"}",
    "deep schema": TEXT.encode()[:-1]
    + b',"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":'
    + b'{"items":' * 300
    + b"{}"
    + b"}" * 300
    + b"}}}",
    "NaN": b'{"model":"tiny","messages":[],"temperature":NaN}',
    "infinity": b'{"model":"tiny","messages":[],"temperature":-Infinity}',
    "a number of a million digits": b'{"model":"tiny","max_tokens":' + b"9" * 1_000_000 + b"}",
    "a number of four thousand digits": TEXT.encode()[:-1] + b',"top_k":' + b"9" * 4000 + b"}",
    "a float beyond floats": TEXT.encode()[:-1] + b',"temperature":1e999}',
    "a lone surrogate as a model": TEXT.replace('"tiny"', r'"\ud800"').encode(),
    "a lone surrogate as a question": TEXT.replace("Who?", r"\udfff").encode(),
    "a lone surrogate as a field": TEXT.encode()[:-1] + rb',"\ud800":1}',
    "a lone surrogate as a stop": TEXT.encode()[:-1] + rb',"stop":["\ud800"]}',
    "a lone surrogate as a person": TEXT.encode()[:-1] + rb',"user":"\ud800"}',
    "no UTF-8": TEXT.encode().replace(b"Who?", b"\xff\xfe\xfd"),
    "an overlong encoding": TEXT.encode().replace(b"Who?", b"\xc0\xaf"),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-32": TEXT.encode("utf-32-be"),
    "latin-1": TEXT.replace("Who?", "Wér?").encode("latin-1"),
    "a byte order mark": TEXT.encode("utf-8-sig"),
    "null characters": TEXT.replace("Who?", r"\u0000").encode(),
    "a comment": ("/* x */" + TEXT).encode(),
    "single quotes": TEXT.replace('"', "'").encode(),
    "a trailing comma": TEXT.encode()[:-1] + b",}",
    "__proto__": TEXT.encode()[:-1] + b',"__proto__":{"x":1},"constructor":1}',
    "gzip": bytes.fromhex("1f8b0800000000000003ab5632a82e0600"),
    "a form": b"model=tiny&messages=x",
}


@pytest.mark.parametrize("case", ODD)
def test_odd_json(endpoint: Endpoint, case: str):
    sound(endpoint.post("/v1/chat/completions", ODD[case]), "/v1/chat/completions")


def test_of_a_field_given_twice_the_last_counts(endpoint: Endpoint):
    """As everywhere else in Python: what is checked is what is used."""
    twice = TEXT.encode()[:-1] + b',"model":"acme/intents","max_tokens":1}'
    answer = endpoint.post("/v1/chat/completions", twice).json()
    assert (answer["model"], answer["usage"]["completion_tokens"]) == ("acme/intents", 1)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "\xff"},
        {"content-encoding": "gzip"},
        {"expect": "100-continue"},
        {"x-request-id": "x" * 5000},
        {"accept": "image/png"},
        {"origin": "http://evil"},
        {"host": "evil"},
    ],
)
def test_odd_headers(endpoint: Endpoint, headers: dict[str, str]):
    sound(endpoint.post("/v1/chat/completions", TEXT.encode(), **headers), "/v1/chat/completions")


@pytest.mark.parametrize(
    "name", ["", "..%2F..%2Fetc%2Fpasswd", "%00", "a%0d%0ab", "%ff", "x" * 5000, "acme%2Fintents@@", "@"]
)
def test_odd_names_in_the_path(endpoint: Endpoint, name: str):
    response = requests.get(f"{endpoint.url}/v1/models/{name}", headers=endpoint.headers, timeout=30)
    assert response.status_code in (400, 404), response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_after_all_that_it_works(endpoint: Endpoint):
    endpoint.works()
