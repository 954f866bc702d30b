"""Names and references: what is one, and what a person is told who wrote something else."""

from __future__ import annotations

import pytest

from orchestrator.errors import InvalidName
from orchestrator.names import AdapterReference, QualifiedName, check_name

DIGEST = "sha256:" + "0f" * 32


@pytest.mark.parametrize("name", ["a", "7", "acme", "a-b", "a" * 63])
def test_names(name: str):
    assert check_name(name, "tenant") == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "Acme", "a_b", "a.b", "a/b", "a\n", "é", "a" * 64, "..", "a b"])
def test_no_names(name: str):
    with pytest.raises(InvalidName) as caught:
        check_name(name, "tenant")
    assert caught.value.context == {"field": "tenant", "value": name}


def test_a_long_text_is_not_repeated_whole():
    with pytest.raises(InvalidName) as caught:
        check_name("x" * 10_000, "route")
    assert len(str(caught.value.to_dict())) < 500


def test_a_qualified_name():
    name = QualifiedName.parse("acme/intents")
    assert (name.tenant, name.name, str(name)) == ("acme", "intents", "acme/intents")
    for bad in ("intents", "acme/", "/intents", "acme/in/tents", "acme/../x"):
        with pytest.raises(InvalidName):
            QualifiedName.parse(bad)
    with pytest.raises(InvalidName, match="acme/intents"):
        QualifiedName.parse("intents")


def test_a_reference_is_an_alias_a_version_or_a_digest():
    by_alias, by_number, by_digest = map(
        AdapterReference.parse, ("acme/intents@production", "acme/intents@3", f"acme/intents@{DIGEST}")
    )
    assert (by_alias.alias, by_alias.number, by_alias.digest) == ("production", None, None)
    assert (by_number.alias, by_number.number, by_number.digest) == (None, 3, None)
    assert (by_digest.alias, by_digest.number, by_digest.digest) == (None, None, DIGEST)
    assert str(by_digest) == f"acme/intents@{DIGEST}"


NO_REFERENCES = """
acme/intents acme/intents@ acme/intents@0 acme/intents@03 acme/intents@3@4 acme/intents@1234567890 intents@3
acme/intents@Production acme/intents@sha256:ab
"""


@pytest.mark.parametrize("text", [*NO_REFERENCES.split(), f"acme/intents@{DIGEST.upper()}"])
def test_no_references(text: str):
    with pytest.raises(InvalidName):
        AdapterReference.parse(text)
