"""How a group of workers ends that failed: at once when a person must act, else after Ray Train's attempts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray.train

from orchestrator.errors import AdaptoryError, JobFailed, OutOfMemory

_DEFECTS = (TypeError, ValueError, LookupError, AttributeError, NameError, SyntaxError, ImportError, AssertionError)


class EndOnLastingErrors(ray.train.UserCallback):
    """Ends the group when one of its workers raised what starting it again would only repeat: an error of ours, or a defect.

    Ray Train restarts a failed group whatever it failed of; but what a callback raises ends it for good.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, failure in worker_exceptions.items():
            if (lasting := _cause(failure, AdaptoryError)) is not None:
                raise lasting
            if (defect := _cause(failure, _DEFECTS)) is not None:
                raise JobFailed(
                    f"Worker {rank} failed with {type(defect).__name__}: {defect}",
                    hint="`adaptory runs logs` shows where. This is a fault of Adaptory, or of a package it uses: please "
                    "report it with that log.",
                    log=str(failure)[-4000:],
                )


def explained(error: ray.train.TrainingFailedError, max_failures: int) -> AdaptoryError:
    """What ended the workers, as one of ours: their own error if it is one, else what Ray says.

    Args:
        max_failures: how often the group may be started again.
    """
    workers = list(getattr(error, "worker_failures", {}).values())
    failures = workers or [getattr(error, "controller_failure", error)]
    for failure in failures:
        if (ours := _cause(failure, AdaptoryError)) is not None:
            return ours
    return failed(
        failures, f"The workers failed {max_failures + 1} times" if workers else "Ray Train could not run the workers"
    )


def failed(failures: Sequence[Exception], what: str) -> AdaptoryError:
    """What ended the workers, by what Ray says.

    Args:
        what: begins the sentence.
    """
    text = str(failures[0]).strip()
    if "memory" in text.lower() and ("killed" in text.lower() or "OOM" in text or "OutOfMemory" in text):
        return OutOfMemory(
            "The machine ran out of memory and a worker was killed.",
            hint="Lower train.micro_batch_tokens or train.max_length, set train.gradient_checkpointing: true, or use "
            "fewer resources.workers on a node.",
        )
    last = text.splitlines()[-1] if text else type(failures[0]).__name__
    return JobFailed(
        f"{what}, last with: {last}",
        hint="`adaptory runs logs` shows what each worker printed.",
        log=text[-4000:],
    )


def _cause(failure: BaseException | None, kind: Any) -> Any:
    """The exception of this kind that a failure is, or that it was wrapped around; None if there is none."""
    while failure is not None and not isinstance(failure, kind):
        failure = getattr(failure, "cause", None) or failure.__cause__
    return failure
