"""The form of an API key: `ak-` + 12 characters of public id + `-` + 256 random bits in base64url.

The id finds the key in the database; the whole key is kept as a SHA-256 only. A slow hash protects words that people choose;
256 random bits need none, and each request would pay for it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from orchestrator.redaction import API_KEY

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"  # base32, in lower case


def new_key() -> tuple[str, str]:
    """A new key's public id, and the key itself."""
    key_id = "".join(secrets.choice(_ALPHABET) for _ in range(12))
    return key_id, f"ak-{key_id}-{secrets.token_urlsafe(32)}"


def key_id(text: str) -> str | None:
    """The public id in a key, or in what `keys list` shows of it (`ak-<id>`); None if there is none."""
    match = API_KEY.fullmatch(text) or re.fullmatch(r"(?:ak-)?([a-z2-7]{12})", text)
    return match[1] if match else None


def is_key(text: str) -> bool:
    """Whether it has the form of a whole key."""
    return API_KEY.fullmatch(text) is not None


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def matches(key: str, stored: str | None) -> bool:
    """Whether `stored` is the hash of `key`; takes as long when there is none as when there is another."""
    return hmac.compare_digest(hash_key(key), stored or "0" * 64)
