"""The form of a key: enough random bits, found by its id, never shown whole."""

from __future__ import annotations

import base64

import pytest

from orchestrator.redaction import redact
from orchestrator.tenants import secrets


def test_a_key_carries_256_random_bits_and_its_id():
    made = [secrets.new_key() for _ in range(200)]
    for key_id, key in made:
        assert key.startswith(f"ak-{key_id}-")
        assert len(base64.urlsafe_b64decode(key[-43:] + "=")) == 32
        assert secrets.is_key(key)
        assert secrets.key_id(key) == secrets.key_id(f"ak-{key_id}") == secrets.key_id(key_id) == key_id
    assert len({key[-43:] for _, key in made}) == len({key_id for key_id, _ in made}) == 200


@pytest.mark.parametrize("text", ["", "ak-", "sk-abcdefghijkl-" + "x" * 43, "ak-ABCDEFGHIJKL-" + "x" * 43, "é" * 59])
def test_what_is_no_key(text: str):
    assert not secrets.is_key(text)
    assert secrets.key_id(text) is None


def test_only_the_same_key_matches():
    (_, key), (_, other) = secrets.new_key(), secrets.new_key()
    assert secrets.matches(key, secrets.hash_key(key))
    assert not secrets.matches(other, secrets.hash_key(key))
    assert not secrets.matches(key[:-1] + ("A" if key[-1] != "A" else "B"), secrets.hash_key(key))
    assert not secrets.matches(key, None)


def test_redaction_leaves_the_id():
    key_id, key = secrets.new_key()
    assert redact(f"Authorization: Bearer {key}, and {key}.") == (
        f"Authorization: Bearer ak-{key_id}-…, and ak-{key_id}-…."
    )
