"""The table that a gateway routes by: all routes of all tenants, resolved to adapter digests. Immutable, replaced whole.

What the registry knows of adapters comes in as one function (`Resolver`), asked once for all that the routes name. A route of which a part cannot be used still stands: those users get its fallback if it has one, else a typed error.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.db import Database, counters
from orchestrator.errors import InvalidName, ModelNotFound, ModelUnavailable, RouteInvalid
from orchestrator.names import AdapterReference, cut, shown
from orchestrator.routing.adapters import PreviousVersion, ResolvedAdapter, Resolver
from orchestrator.routing.choosing import choose
from orchestrator.routing.config import BASE, PREVIOUS, Defaults, RouteConfig, parse_config
from orchestrator.routing.repository import Route, current_routes

KEPT_VERSIONS = 4096
"""Versions that were asked for by name (`acme/intents@3`) and are remembered for a table's life."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing that can answer."""

    reference: str
    """How the route calls it: `acme/intents@production`, or `base`."""
    adapter: str | None
    """Digest; None is the base itself."""
    base_model: str
    base_digest: str
    fallback: bool = False
    """Whether it stands in for another."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes."""

    model: str
    """Public name, as asked for: what usage and metrics are counted by."""
    choices: tuple[Choice, ...]
    """At least one. The first answers; each next one when those before cannot."""
    defaults: Defaults = field(default_factory=Defaults)
    revision: int | None = None
    """Of the route; None when none was asked for."""

    @property
    def adapter(self) -> str | None:
        """Digest of the adapter that answers; None when the base does."""
        return self.choices[0].adapter

    @property
    def base_model(self) -> str:
        return self.choices[0].base_model

    @property
    def fallbacks(self) -> tuple[Choice, ...]:
        return self.choices[1:]


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A route with everything looked up: for each arm what answers its users."""

    revision: int
    arms: tuple[tuple[str, int], ...]
    targets: tuple[Target | None, ...]
    """As `arms`; None where nothing can answer."""
    reasons: tuple[str, ...]
    """What cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class RouteTable:
    version: int
    """Of the counter that it was built at."""
    bases: Mapping[str, str]
    """Public name of each base that is served → its digest."""
    _routes: Mapping[str, _Compiled] = field(repr=False)
    _version: Callable[[AdapterReference], ResolvedAdapter] = field(repr=False)

    def resolve(self, tenant: str, model: str, user: str | None = None) -> Target:
        """Where a tenant's request for `model` goes: a route of its own, a base, or one version of its own adapters.

        Args:
            user: OpenAI's `user` field: the same user gets the same arm. None: drawn anew.

        Raises:
            ModelNotFound: nothing of that name answers this tenant, whoever else may have one.
            ModelUnavailable: the route exists, but neither its adapter nor a fallback can be used.
            DatabaseError: a version not seen before could not be looked up.
        """
        if "@" in model:
            return self._one_version(tenant, model)
        if model.startswith(f"{tenant}/") and (route := self._routes.get(model)) is not None:
            return self._routed(model, route, user)
        if (digest := self.bases.get(model)) is not None:
            return Target(model, (Choice(BASE, None, model, digest),))
        raise _not_found(model)

    def models(self, tenant: str) -> tuple[str, ...]:
        """Every name that `resolve` knows without a version: the tenant's routes, then the bases."""
        own = sorted(name for name in self._routes if name.startswith(f"{tenant}/"))
        return (*own, *sorted(set(self.bases) - set(own)))

    def adapters(self) -> frozenset[str]:
        """Digests of all adapters that some route may send a request to: what is worth having at hand."""
        routes = self._routes.values()
        targets = [target for route in routes for target in route.targets if target is not None]
        return frozenset(choice.adapter for target in targets for choice in target.choices if choice.adapter)

    def problems(self) -> dict[str, tuple[str, ...]]:
        """Routes of which a part cannot be used, and why; for whoever runs the gateway."""
        return {name: route.reasons for name, route in self._routes.items() if route.reasons}

    def _routed(self, model: str, route: _Compiled, user: str | None) -> Target:
        target = route.targets[choose(model, user, route.arms)] if route.arms else None
        if target is None:
            raise ModelUnavailable(
                f"The model {model} cannot answer: {'; '.join(route.reasons)}.",
                hint=f"`adaptory routes show {model}` shows the route; `--fallback base` lets the base model stand in.",
                model=model,
                reasons=list(route.reasons),
            )
        return target

    def _one_version(self, tenant: str, model: str) -> Target:
        try:
            reference = AdapterReference.parse(model)
        except InvalidName:
            raise _not_found(model) from None
        if reference.tenant != tenant:
            raise _not_found(model)
        try:
            found = self._version(reference)
        except KeyError:
            raise _not_found(model) from None
        base = next((name for name, digest in self.bases.items() if digest == found.base_digest), None)
        if base is None:
            raise ModelUnavailable(
                f"The model {model} cannot answer: its base model is not served here.",
                hint="`GET /v1/models` lists the base models that are.",
                model=model,
                reasons=["its base model is not served here"],
            )
        return Target(model, (Choice(model, found.digest, base, found.base_digest),))


def build_table(db: Database, resolver: Resolver, bases: Mapping[str, str]) -> RouteTable:
    """The table of this moment.

    Args:
        bases: public name of each base that is served → its digest.

    Raises:
        DatabaseError
    """
    with db.read() as session:
        version = counters.current(session, counters.ROUTING)  # before what is resolved: that may be newer, never older
        routes = current_routes(session)
    configs: dict[str, tuple[Route, RouteConfig | str]] = {}
    for route in routes:
        try:
            configs[str(route.public_name)] = route, parse_config(route.public_name, route.config)
        except RouteInvalid as error:  # a newer version's: it costs this one route, not all
            configs[str(route.public_name)] = route, error.message.rstrip(".")
    named = {each for _, config in configs.values() if not isinstance(config, str) for each in config.references}
    found = dict(resolver(named)) if named else {}

    @functools.lru_cache(KEPT_VERSIONS)
    def version_of(reference: AdapterReference) -> ResolvedAdapter:
        return found[reference] if reference in found else resolver([reference])[reference]

    compiled = {
        name: _Compiled(route.revision, (), (), (config,))
        if isinstance(config, str)
        else _compile(name, route.revision, config, found, bases)
        for name, (route, config) in configs.items()
    }
    return RouteTable(version, types.MappingProxyType(dict(bases)), types.MappingProxyType(compiled), version_of)


def _compile(
    name: str,
    revision: int,
    config: RouteConfig,
    found: Mapping[AdapterReference, ResolvedAdapter],
    bases: Mapping[str, str],
) -> _Compiled:
    reasons: list[str] = []
    base = _base_of(config, found, bases, reasons)

    def choice(reference: str, *, instead_of: str | None = None) -> Choice | None:
        if base is None:
            return None
        if reference == BASE:
            return Choice(BASE, None, *base, fallback=instead_of is not None)
        adapter: ResolvedAdapter | PreviousVersion | None
        if reference == PREVIOUS and instead_of is not None:
            named = found.get(AdapterReference.parse(instead_of))
            adapter = named.previous if named else None
            reference = adapter.reference if adapter else f"version before {instead_of}"
        else:
            adapter = found.get(AdapterReference.parse(reference))
        if adapter is None:
            reasons.append(f"there is no {reference}")
        elif adapter.base_digest != base[1]:
            reasons.append(f"{reference} belongs to another base model than {base[0]}")
        else:
            return Choice(reference, adapter.digest, *base, fallback=instead_of is not None)
        return None

    arms = tuple((arm.adapter, arm.weight) for arm in config.adapters) or ((BASE, 1),)
    targets = []
    for reference, _ in arms:
        choices: dict[str | None, Choice] = {}  # by adapter: who has failed once is not asked again
        for made in (choice(reference), *(choice(each, instead_of=reference) for each in config.fallback)):
            if made is not None:
                choices.setdefault(made.adapter, made)
        targets.append(Target(name, tuple(choices.values()), config.defaults, revision) if choices else None)
    return _Compiled(revision, arms, tuple(targets), tuple(dict.fromkeys(reasons)))


def _base_of(
    config: RouteConfig,
    found: Mapping[AdapterReference, ResolvedAdapter],
    bases: Mapping[str, str],
    reasons: list[str],
) -> tuple[str, str] | None:
    """Name and digest of the route's base: the one it names, or that of the first adapter which exists."""
    if config.base_model is not None:
        if config.base_model in bases:
            return config.base_model, bases[config.base_model]
        reasons.append(f"the base model {shown(config.base_model)} is not served here")
        return None
    digest = next((found[each].base_digest for each in config.references if each in found), None)
    if digest is None:
        reasons.extend(f"there is no {each}" for each in config.references)
        return None
    base = next(((name, known) for name, known in bases.items() if known == digest), None)
    if base is None:
        reasons.append("its adapters' base model is not served here")
    return base


def _not_found(model: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model {shown(model)} does not exist, or you have no access to it.",
        hint="`GET /v1/models` lists those that you may use.",
        model=cut(model),
    )
