"""How a group of workers ends that failed: at once when a person must act, else after Ray Train's attempts."""

from __future__ import annotations

from typing import Any

import ray.train

from orchestrator.errors import AdaptoryError, JobFailed, OutOfMemory


class EndOnOurErrors(ray.train.UserCallback):
    """Ends the group when one of its workers raised an error of ours, which starting it again would only repeat.

    Ray Train restarts a failed group whatever it failed of; but what a callback raises ends it for good.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for failure in worker_exceptions.values():
            if (ours := _ours(failure)) is not None:
                raise ours


def explained(error: ray.train.TrainingFailedError, max_failures: int) -> AdaptoryError:
    """What ended the workers, as one of ours: their own error if it is one, else what Ray says.

    Args:
        max_failures: how often the group may be started again.
    """
    workers = list(getattr(error, "worker_failures", {}).values())
    failures = workers or [getattr(error, "controller_failure", error)]
    for failure in failures:
        if (ours := _ours(failure)) is not None:
            return ours
    text = str(failures[0]).strip()
    if "memory" in text.lower() and ("killed" in text.lower() or "OOM" in text or "OutOfMemory" in text):
        return OutOfMemory(
            "The machine ran out of memory and a worker was killed.",
            hint="Lower train.micro_batch_tokens or train.max_length, set train.gradient_checkpointing: true, or use "
            "fewer resources.workers on a node.",
        )
    last = text.splitlines()[-1] if text else type(failures[0]).__name__
    return JobFailed(
        f"The workers failed {max_failures + 1} times, last with: {last}"
        if workers
        else f"Ray Train could not run the workers: {last}",
        hint="`adaptory runs logs` shows what each worker printed.",
        log=text[-4000:],
    )


def _ours(failure: BaseException | None) -> AdaptoryError | None:
    """The AdaptoryError that a failure is, or that it was wrapped around."""
    while failure is not None and not isinstance(failure, AdaptoryError):
        failure = getattr(failure, "cause", None) or failure.__cause__
    return failure
