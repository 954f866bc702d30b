"""The one exception family of Adaptory.

Every message says what happened, where (file, line, field, value), and what to do next. Errors cross Ray process borders
and travel inside a run's `result.json`, so each one pickles and turns into JSON without loss.
"""

from __future__ import annotations

from typing import Any


class AdaptoryError(Exception):
    """Something a person can act on; printed in one paragraph, without a traceback.

    Args:
        message: what happened, with the place and the value.
        hint: what to do next, as a sentence; printed after the message.
        **context: JSON-able facts for machines (`file`, `line`, `field`, `value`, …), kept in `to_dict()`.
    """

    code = "error"
    """Stable machine-readable name, used in `--json` and in `result.json`."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, **context: Any):
        # what is quoted may end with a full stop of its own
        message = message[:-1] if message.endswith("..") and not message.endswith("...") else message
        super().__init__(message)
        self.message, self.hint, self.context = message, hint, context

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.hint, self.context)

    def to_dict(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "hint": self.hint, **self.context}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> AdaptoryError:
        """The error that `to_dict` described; an unknown code becomes a plain `AdaptoryError`."""
        data = dict(data)
        kind = _by_code(AdaptoryError).get(data.pop("code", ""), AdaptoryError)
        return kind(data.pop("message", "unknown error"), hint=data.pop("hint", None), **data)


def _rebuild(kind: type[AdaptoryError], message: str, hint: str | None, context: dict[str, Any]) -> AdaptoryError:
    return kind(message, hint=hint, **context)


def _by_code(root: type[AdaptoryError]) -> dict[str, type[AdaptoryError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _by_code(child)
    return found


class UsageError(AdaptoryError):
    """A command that cannot be carried out as it was typed. Context: `value`."""

    code = "usage"
    exit_code = 2


class OutputError(AdaptoryError):
    """What a person asked for cannot be written where it should go. Context: `file`."""

    code = "output_unwritable"


class SettingsError(AdaptoryError):
    """An ADAPTORY_* variable that cannot be used."""

    code = "invalid_settings"
    exit_code = 2


class InvalidName(AdaptoryError):
    """A name that cannot be one. Context: `field`, `value`."""

    code = "invalid_name"
    exit_code = 2


class SpecError(AdaptoryError):
    """A job spec that cannot be used. Context: `file`, `line`, `field`, `value`."""

    code = "invalid_spec"
    exit_code = 2


class DataError(AdaptoryError):
    """Data that cannot be trained on. Context: `file`, `line`, `field`, `value`."""

    code = "invalid_data"
    exit_code = 2


class ModelError(AdaptoryError):
    """A base model that is not there or cannot be trained. Context: `model`."""

    code = "invalid_model"
    exit_code = 2


class PackageError(AdaptoryError):
    """A PyPI package (of a model or of data) that cannot be fetched or read. Context: `package`."""

    code = "package_unavailable"
    exit_code = 2


class AdapterError(AdaptoryError):
    """An adapter that is missing, damaged, empty or does not fit its base. Context: `adapter`, `check`."""

    code = "invalid_adapter"


class AdapterNotFound(AdapterError):
    """No adapter, version or alias has this name, or more than one has. Context: `adapter`."""

    code = "adapter_not_found"
    exit_code = 2


class SignatureInvalid(AdapterError):
    """An adapter that is not signed, is signed by a key that is not trusted, or was changed since. Context: `check`, which
    is `signature`."""

    code = "signature_invalid"


class AliasMoved(AdapterError):
    """An alias does not stand where the caller thought, so it was not moved. Context: `alias`, `expected`, `found`."""

    code = "alias_moved"


class KeyUnusable(AdaptoryError):
    """A signing or trusted key that is not there, not readable or of another kind. Context: `path`."""

    code = "key_unusable"
    exit_code = 2


class AdapterUnavailable(AdaptoryError):
    """An adapter that cannot be loaded now, by no fault of its own; asking again later can succeed. Context: `adapter`."""

    code = "adapter_unavailable"


class AdapterLoadTimeout(AdapterUnavailable):
    """It is still on its way, and the caller's time is over; the load goes on."""

    code = "adapter_load_timeout"


class AdapterCacheFull(AdapterUnavailable):
    """Everything that could make room for it is in use."""

    code = "adapter_cache_full"


class StoreError(AdaptoryError):
    """The artifact store cannot be read or written. Context: `url`, `path`."""

    code = "store_unavailable"


class DatabaseError(AdaptoryError):
    """The control plane's database cannot be opened, read or written. Context: `url`."""

    code = "database_unavailable"


class ObjectMissing(StoreError):
    """Nothing is at this path of the store."""

    code = "object_missing"


class DiskFull(StoreError):
    """No room for what had to be written. Context: `path`, `free`, `total` (bytes)."""

    code = "disk_full"


class CorruptObject(StoreError):
    """Stored bytes do not have the digest that their manifest or name promises."""

    code = "object_corrupt"


class ClusterError(AdaptoryError):
    """The Ray cluster cannot be reached, does not fit, or cannot run this job."""

    code = "cluster_unavailable"


class InsufficientResources(ClusterError):
    """More was asked for than the cluster has or its autoscaler may ever add."""

    code = "insufficient_resources"


class RunError(AdaptoryError):
    """A run that cannot do what was asked of it. Context: `run`, `state`."""

    code = "run_error"


class RunNotFound(RunError):
    code = "run_not_found"
    exit_code = 2


class RunExists(RunError):
    code = "run_exists"
    exit_code = 2


class IllegalTransition(RunError):
    """A run cannot go from its present state to the one asked for."""

    code = "illegal_transition"


class TrialError(RunError):
    """A trial of a sweep that cannot do what was asked of it. Context: `run`, `trial`."""

    code = "trial_error"
    exit_code = 2


class TrialNotFound(TrialError):
    code = "trial_not_found"


class JobFailed(RunError):
    """A run's Ray job ended without a result of its own. Context: `run`, `ray_status`, `log`."""

    code = "job_failed"


class TrainingError(AdaptoryError):
    """Training stopped for a reason of its own. Context: `step`, `learning_rate`."""

    code = "training_failed"


class TrainingDiverged(TrainingError):
    """The loss is not finite; the last good checkpoint is kept."""

    code = "training_diverged"


class OutOfMemory(TrainingError):
    """The device or the machine has too little memory for this step."""

    code = "out_of_memory"


class TrialRunsAlone(TrainingError):
    """A trial that cannot share a network with others: it must be a run of its own. Context: `trial`, `reason`."""

    code = "trial_runs_alone"


class NoFreeLane(TrainingError):
    """As many trials as fit are trained already: one must end first. Context: `trial`, `lanes`."""

    code = "no_free_lane"


class Superseded(RunError):
    """A newer attempt owns this run; this one must stop without writing."""

    code = "superseded"


class EngineError(AdaptoryError):
    """The serving engine cannot answer a request. Context: `request`."""

    code = "engine_error"


class InvalidRequest(EngineError):
    """A request that no engine with this base could answer. Context: `field`, `value`."""

    code = "invalid_request"


class EngineOverloaded(EngineError):
    """As many requests wait already as may; asking again later can succeed. Context: `waiting`; from a replica its `replica`, from all
    of them `everywhere`."""

    code = "engine_overloaded"


class AdapterNotLoaded(EngineError):
    """The request's adapter is in no slot of this engine. Context: `adapter`."""

    code = "adapter_not_loaded"


class AdapterInUse(EngineError):
    """An adapter that requests still use cannot leave its slot. Context: `adapter`, `requests`."""

    code = "adapter_in_use"


class NoFreeSlot(EngineError):
    """Every adapter slot is taken: unload one first. Context: `adapter`, `slots`."""

    code = "no_free_slot"


class StepFailed(EngineError):
    """The engine's step failed under this request, by no fault of the request that is known. Context: `cause`."""

    code = "engine_step_failed"


class EngineStopped(EngineError):
    """The engine is shut down, or was while it answered."""

    code = "engine_stopped"


class ReplicaUnavailable(EngineError):
    """No replica of an engine takes the request now, or the one that did is gone; asking again can succeed."""

    code = "replica_unavailable"


class GatewayDraining(AdaptoryError):
    """A gateway that is being ended answers what it had begun and takes nothing new; another, or a later one, will."""

    code = "draining"


class RequestTooLarge(AdaptoryError):
    """A request's body has more bytes than are read. Context: `limit`."""

    code = "request_too_large"


class RequestTimeout(AdaptoryError):
    """A request's body did not arrive in time. Context: `seconds`."""

    code = "request_timeout"


class RateLimited(AdaptoryError):
    """A tenant has used up what it may. Context: `limit`, `retry_after` (seconds; null: never)."""

    code = "rate_limit_exceeded"


class TenantError(AdaptoryError):
    """A tenant that cannot do what was asked of it. Context: `tenant`."""

    code = "tenant_error"
    exit_code = 2


class TenantNotFound(TenantError):
    code = "tenant_not_found"


class TenantExists(TenantError):
    code = "tenant_exists"


class TenantInUse(TenantError):
    """It owns what would be lost with it. Context: `owns`, a count of each kind."""

    code = "tenant_in_use"
    exit_code = 1


class ApiKeyError(AdaptoryError):
    """An API key that cannot be made, found or used. Context: `key`, the public id; never the secret."""

    code = "api_key_error"
    exit_code = 2


class ApiKeyNotFound(ApiKeyError):
    code = "api_key_not_found"


class ApiKeyExists(ApiKeyError):
    code = "api_key_exists"


class ApiKeyRefused(ApiKeyError):
    """Who asks has not shown a key that is valid now."""

    code = "invalid_api_key"


class ScopeMissing(ApiKeyError):
    """The key is valid, but not for this. Context: `scope`."""

    code = "insufficient_scope"


class RouteError(AdaptoryError):
    """A route that cannot do what was asked of it. Context: `route`."""

    code = "route_error"
    exit_code = 2


class RouteInvalid(RouteError):
    """Context: `field`, `value`."""

    code = "invalid_route"


class RouteNotFound(RouteError):
    code = "route_not_found"


class RouteConflict(RouteError):
    """Somebody else has changed the route since it was read. Context: `revision`, the present one."""

    code = "route_conflict"
    exit_code = 1


class ModelNotFound(AdaptoryError):
    """Nothing of this name answers this tenant: unknown and somebody else's are the same. Context: `model`."""

    code = "model_not_found"


class ModelUnavailable(AdaptoryError):
    """The tenant's own route, of which nothing can answer now. Context: `model`, `reasons`."""

    code = "model_unavailable"
