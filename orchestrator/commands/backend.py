"""What a command works with: settings, database, store and cluster, each opened when it is first needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer

from orchestrator.commands.output import say
from orchestrator.errors import AdaptoryError, ClusterError

if TYPE_CHECKING:
    from orchestrator.db import Database
    from orchestrator.registry.signing import Keys
    from orchestrator.runs.client import JobClient
    from orchestrator.runs.run import Run
    from orchestrator.settings import Settings
    from orchestrator.store import Store


class Backend:
    """The composition root's parts. Commands that only read never start a cluster."""

    @cached_property
    def settings(self) -> Settings:
        from orchestrator.settings import load_settings

        return load_settings()

    @cached_property
    def db(self) -> Database:
        from orchestrator.db import open_database

        return open_database(self.settings.database)

    @cached_property
    def store(self) -> Store:
        from orchestrator.store import Store

        return Store(self.settings.store)

    @cached_property
    def actor(self) -> str:
        """Who changes something, for the record: the account on this machine."""
        import getpass
        import socket

        try:
            return f"{getpass.getuser()}@{socket.gethostname()}"
        except (KeyError, OSError):  # a container's user without a name
            return f"uid-{os.getuid()}@{socket.gethostname()}"

    @cached_property
    def keys(self) -> Keys:
        from orchestrator.registry.signing import Keys

        return Keys.of(self.settings)

    @cached_property
    def jobs(self) -> JobClient:
        """The cluster; a local Ray is started if none runs, and says so."""
        import cluster

        return cluster.connect(self.settings, say=say)

    @cached_property
    def jobs_if_running(self) -> JobClient | None:
        """The cluster if it answers; one that does not is a warning, since what a command reads is in the database anyway.

        A local Ray that does not run is known to hold no job; of a remote one that is silent nothing is known.
        """
        import cluster

        try:
            return cluster.connect_if_running(self.settings) or _StoppedRay()
        except AdaptoryError as error:
            say(f"Warning: {error}")
            return None

    def reconcile(self) -> None:
        """Bring the database up to date with Ray and the store; what cannot be asked now is said and left as it is."""
        from orchestrator.runs.reconcile import reconcile

        report = reconcile(
            self.db, self.store, self.jobs_if_running, ray_address=self.settings.ray_address, keys=self.keys
        )
        for warning in report.warnings:
            say(f"Warning: {warning}")

    def run(self, reference: str) -> Run:
        """The run with this id or name, after one reconciliation."""
        from orchestrator.runs.repository import get_run

        self.reconcile()
        return get_run(self.db, reference)


class _StoppedRay:
    """The local Ray while it does not run: what was on it has ended, and nothing can be sent to it."""

    def submit(self, submission_id: str, entrypoint: str, *, env: dict[str, str], metadata: dict[str, str]) -> None:
        raise self._stopped()

    def status(self, submission_id: str) -> None:
        return None

    def stop(self, submission_id: str) -> None:
        return None

    def logs(self, submission_id: str) -> str:
        return ""

    def describe(self) -> dict[str, Any]:
        raise self._stopped()

    @staticmethod
    def _stopped() -> ClusterError:
        return ClusterError("No local Ray runs.", hint="`adaptory up` starts it; a queued run is then sent to it.")


def complete_tenant(incomplete: str) -> list[str]:
    """Names of tenants for the shell."""
    from orchestrator.tenants.tenant import list_tenants

    return _complete(incomplete, lambda db: (tenant.name for tenant in list_tenants(db)))


def complete_route(incomplete: str) -> list[str]:
    """Names of routes for the shell."""
    from orchestrator.routing.repository import list_routes

    return _complete(incomplete, lambda db: (str(route.public_name) for route in list_routes(db)))


def complete_version(incomplete: str) -> list[str]:
    """Numbered versions of adapters and their aliases for the shell."""
    from orchestrator.registry.versions import list_versions

    def names(db: Database) -> Iterable[str]:
        for version in list_versions(db):
            yield from (f"{version.tenant}/{version.name}@{alias}" for alias in version.aliases)
            yield version.reference

    return _complete(incomplete, names)


def complete_run(incomplete: str) -> list[str]:
    """Names of runs for the shell."""
    from orchestrator.runs.repository import list_runs

    return _complete(incomplete, lambda db: (run.name for run in list_runs(db)))


def complete_sweep(incomplete: str) -> list[str]:
    """Names of sweeps for the shell."""
    from orchestrator.runs.repository import list_runs

    return _complete(incomplete, lambda db: (run.name for run in list_runs(db) if run.sweeps))


def complete_trial(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the trials of the sweep that was typed before, those that can still be stopped."""
    from orchestrator.runs.repository import get_run, list_events
    from orchestrator.runs.sweeps import SweepProgress

    def names(db: Database) -> Iterable[str]:
        run = get_run(db, str(ctx.params.get("name") or ""))
        progress = SweepProgress.of(run, list_events(db, run.id))
        over = {trial.name for trial in progress.trials if trial.state.over}
        return (name for name in progress.names() if name not in over)

    return _complete(incomplete, names)


def _complete(incomplete: str, names: Callable[[Database], Iterable[str]]) -> list[str]:
    """A Tab never shows that the settings or the database are wrong; the command itself does."""
    try:
        return [name for name in names(Backend().db) if name.startswith(incomplete)]
    except AdaptoryError:
        return []
