"""Names that people give: of tenants, adapters, routes and keys. One pattern for all, so that each is also a safe path and label."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.errors import InvalidName
from orchestrator.redaction import redact

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""Lower-case letters, digits and dashes, at most 63; neither the first nor the last is a dash."""

_NAME = re.compile(NAME_PATTERN.strip("^$"))
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SHOWN = 80


def is_name(value: str) -> bool:
    return _NAME.fullmatch(value) is not None


def check_name(value: str, what: str) -> str:
    """`value`, if it is a name.

    Args:
        what: what it names, for the message: `tenant`, `route`, `key`.

    Raises:
        InvalidName
    """
    if not is_name(value):
        raise InvalidName(
            f"{shown(value)} is no name of a {what}.",
            hint="A name has 1 to 63 lower-case letters, digits and dashes, and no dash at its ends.",
            field=what,
            value=cut(value),
        )
    return value


def shown(value: str) -> str:
    """Somebody's text in quotes, cut to a length that a message can hold, without the secret of a key."""
    return repr(cut(value))


def cut(value: str) -> str:
    """The same without quotes."""
    value = redact(value)
    return value if len(value) <= _SHOWN else value[: _SHOWN - 1] + "…"


@dataclass(frozen=True, slots=True)
class QualifiedName:
    """`tenant/name`: how an adapter or a route is called outside its tenant."""

    tenant: str
    name: str

    @classmethod
    def parse(cls, text: str, what: str = "route") -> QualifiedName:
        """
        Raises:
            InvalidName: it is not of the form `tenant/name`.
        """
        tenant, slash, name = text.partition("/")
        if not slash:
            hint = f"Write TENANT/NAME, such as acme/{text if is_name(text) else 'intents'}."
            raise InvalidName(f"{shown(text)} does not say whose {what} it is.", hint=hint, value=cut(text))
        return cls(check_name(tenant, "tenant"), check_name(name, what))

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """One adapter version: `acme/intents@production` (an alias), `@3` (a version), `@sha256:…` (a digest)."""

    tenant: str
    name: str
    version: str
    """What stands after the `@`."""

    @classmethod
    def parse(cls, text: str) -> AdapterReference:
        """
        Raises:
            InvalidName: it is not of the form `tenant/name@version`.
        """
        name, at, version = text.partition("@")
        if not at:
            hint = f"Write {text}@3, {text}@production or {text}@sha256:… ."
            raise InvalidName(f"{shown(text)} does not say which version.", hint=hint, value=cut(text))
        if not (_NUMBER.fullmatch(version) or _DIGEST.fullmatch(version)):
            if version.isdigit() or version.startswith("sha256"):
                raise InvalidName(
                    f"{shown(version)} is neither a version nor a digest.",
                    hint="Versions count from 1; a digest is sha256: and 64 hexadecimal digits.",
                    value=cut(version),
                )
            check_name(version, "alias")
        whole = QualifiedName.parse(name, "adapter")
        return cls(whole.tenant, whole.name, version)

    @property
    def number(self) -> int | None:
        return int(self.version) if _NUMBER.fullmatch(self.version) else None

    @property
    def digest(self) -> str | None:
        return self.version if self.version.startswith("sha256:") else None

    @property
    def alias(self) -> str | None:
        return None if self.number or self.digest else self.version

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.version}"
