"""From a job's result to a signed version, through the reconciliation that every command runs (3 s)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.db import Database, audit
from orchestrator.errors import AdapterError, AdaptoryError, SignatureInvalid
from orchestrator.modeling.base_model import BaseModel
from orchestrator.registry import intake
from orchestrator.registry.adapters import publish_adapter
from orchestrator.registry.intake import publishing_alone, take_in
from orchestrator.registry.provenance import Provenance
from orchestrator.registry.signing import Keys
from orchestrator.registry.verification import verify
from orchestrator.registry.versions import list_versions
from orchestrator.runs.reconcile import ReconcileReport, reconcile
from orchestrator.runs.repository import create_run, get_run, list_adapters, list_events, save_resolved, transition
from orchestrator.runs.result import RunResult
from orchestrator.runs.run import Run
from orchestrator.runs.states import RunState
from orchestrator.spec.job import JobSpec
from orchestrator.store import Store, adapter_path, result_path

Publish = Callable[[str], tuple[Run, str]]


@pytest.fixture
def publish(
    db: Database,
    store: Store,
    base: BaseModel,
    trained: Callable[..., Path],
    provenance: Callable[..., Provenance],
) -> Publish:
    """A job has trained, published and written its result; nobody has looked since."""

    def run(name: str) -> tuple[Run, str]:
        spec = JobSpec(name=name, tenant="acme", base_model=base.reference, data={"train": "rows.jsonl"})
        made = save_resolved(db, create_run(db, spec), {"store_url": store.url}, {})
        made = transition(db, made, RunState.QUEUED)
        made = transition(db, made, RunState.RUNNING)
        digest = publish_adapter(store, trained(), base.digest, provenance(run=made.id, name=name))
        result = RunResult(attempt=1, state=RunState.SUCCEEDED, adapter=digest, finished_at=time.time())
        store.write_json(result_path(made.id), result.model_dump(mode="json"))
        return made, digest

    return run


@pytest.fixture
def look(db: Database, store: Store, keys: Keys) -> Callable[[], ReconcileReport]:
    return lambda: reconcile(db, store, None, ray_address=None, keys=keys)


def test_what_a_run_published_is_signed_and_the_next_version_of_its_name(
    publish: Publish, look: Callable[[], ReconcileReport], db: Database, store: Store, keys: Keys
) -> None:
    run, digest = publish("intents")
    assert look().changed == {run.id: RunState.SUCCEEDED}
    assert verify(store, digest, trust=keys.trust()).ok
    (version,) = list_versions(db)
    assert (version.reference, version.digest, version.run_id) == ("acme/intents@1", digest, run.id)
    (entry,) = audit.entries(db)
    assert (entry.actor, entry.action, entry.after) == (f"run {run.id}", "adapter.register", {"digest": digest})
    kept = {path: store.read(path) for path in store.list("adapters")}
    look()
    assert {path: store.read(path) for path in store.list("adapters")} == kept
    assert list_versions(db) == [version]


def test_two_runs_with_equal_weights_are_versions_of_one_digest(
    publish: Publish, look: Callable[[], ReconcileReport], db: Database
) -> None:
    digest = {publish(name)[1] for name in ("intents", "other")}
    look()
    assert {(v.reference, v.digest) for v in list_versions(db)} == {
        (f"acme/{name}@1", *digest) for name in ("intents", "other")
    }


def test_what_is_not_what_was_trained_is_no_version_and_the_run_says_so(
    publish: Publish, look: Callable[[], ReconcileReport], db: Database, store: Store
) -> None:
    run, digest = publish("intents")
    file = Path(store.full(f"{adapter_path(digest)}/adapter_model.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert look().warnings == []
    assert get_run(db, run.id).state is RunState.SUCCEEDED
    assert list_versions(db) == []
    assert [adapter.digest for adapter in list_adapters(db)] == [digest]
    event = list_events(db, run.id)[-1]
    assert event.level == "error"
    assert "Its adapter cannot be used" in event.message
    assert "the bytes were changed" in event.message
    assert not store.exists(f"{adapter_path(digest)}/model.sig")


def test_killed_between_signing_and_registering(
    publish: Publish,
    look: Callable[[], ReconcileReport],
    db: Database,
    store: Store,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, digest = publish("intents")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.runs.repository.versions.register", killed)
        with pytest.raises(KeyboardInterrupt):
            look()
    assert get_run(db, run.id).state is RunState.RUNNING
    assert verify(store, digest, trust=keys.trust()).ok
    look()
    assert [version.reference for version in list_versions(db)] == ["acme/intents@1"]


def test_without_a_usable_key_the_run_waits_and_says_why(
    publish: Publish, look: Callable[[], ReconcileReport], db: Database, keys: Keys
) -> None:
    run, _ = publish("intents")
    keys.public()
    keys.private.chmod(0o644)
    (warning,) = look().warnings
    assert "can be read by others" in warning
    assert get_run(db, run.id).state is RunState.RUNNING
    keys.private.chmod(0o600)
    assert look().changed == {run.id: RunState.SUCCEEDED}


def test_somebody_elses_signature_is_not_replaced(
    publish: Publish, look: Callable[[], ReconcileReport], db: Database, store: Store, keys: Keys, tmp_path: Path
) -> None:
    _, digest = publish("intents")
    other = Keys(tmp_path / "other" / "signing.pem", own=True)
    assert take_in(db, store, digest, other)
    with pytest.raises(SignatureInvalid):
        take_in(db, store, digest, keys)
    look()
    assert list_versions(db) == []


def test_one_at_a_time(db: Database, store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_PATIENCE", 0.0)
    digest = "sha256:" + "0" * 64
    with publishing_alone(db, digest), pytest.raises(AdaptoryError, match="Another process") as caught:
        take_in(db, store, digest, keys)
    assert not isinstance(caught.value, AdapterError), "it is to be repeated, not given up"
