"""What every job does around its work: where it speaks and logs, and how its last word reaches the control plane."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobs.train.exhausted import explained_exhaustion
from jobs.train.fence import check_still_ours
from orchestrator.errors import AdaptoryError, StoreError, Superseded
from orchestrator.runs.events import EventWriter
from orchestrator.runs.logs import StoreLogHandler
from orchestrator.runs.result import RunResult, last_words
from orchestrator.runs.states import RunState
from orchestrator.spec.resolved import ResolvedSpec
from orchestrator.store import Store, result_path, spec_path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One Ray job of a run, as its driver has it."""

    store: Store
    run: str
    number: int
    events: EventWriter
    began: float
    """Seconds since the epoch."""

    def resolved(self) -> ResolvedSpec:
        return ResolvedSpec.model_validate(self.store.read_json(spec_path(self.run)))


def main(program: str, work: Callable[[Attempt], RunResult], arguments: list[str] | None = None) -> int:
    """Exit status 0 when the attempt ended as it should (paused included), 1 when it failed; the result says why."""
    began = time.time()
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--store", required=True, help="URL of the artifact store")
    parser.add_argument("--run", required=True, help="run id")
    parser.add_argument("--attempt", required=True, type=int)
    options = parser.parse_args(arguments)
    store = Store(options.store)
    with Logging(store, options.run, options.attempt, "driver"):
        events = EventWriter(store, options.run, options.attempt, "driver")
        try:
            with explained_exhaustion("starting"):
                result = work(Attempt(store, options.run, options.attempt, events, began))
        except AdaptoryError as error:
            log.error("%s", error)
            events.emit("message", str(error), level="error")
            result = RunResult(
                attempt=options.attempt, state=RunState.FAILED, error=error.to_dict(), finished_at=time.time()
            )
        finally:
            events.close()
        try:
            _write_unless_there(store, options.run, result)
        except Superseded as error:
            log.warning("%s", error)
        except StoreError as error:
            log.error("The result could not be written: %s", error)
            # Ray keeps what a job prints, and the control plane looks there
            sys.stdout.write(f"\n{last_words(result)}\n")
            sys.stdout.flush()
    return 1 if result.state is RunState.FAILED else 0


class Logging:
    """This process's log lines, in the store and on stderr."""

    def __init__(self, store: Store, run: str, attempt: int, writer: str):
        self._handler = StoreLogHandler(store, run, attempt, writer)
        self._handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def __enter__(self) -> None:
        root = logging.getLogger()
        root.addHandler(self._handler)
        root.setLevel(min(root.level or logging.INFO, logging.INFO))
        for noisy in ("ray", "filelock", "urllib3", "botocore", "aiobotocore", "s3fs", "fsspec", "httpx"):
            logging.getLogger(noisy).setLevel(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()


def write_result(store: Store, run: str, result: RunResult) -> None:
    """The last word of an attempt.

    Raises:
        Superseded: a newer attempt owns the run.
    """
    check_still_ours(store, run, result.attempt)
    store.write_json(result_path(run), result.model_dump(mode="json"))


def _write_unless_there(store: Store, run: str, result: RunResult) -> None:
    if store.exists(result_path(run)) and store.read_json(result_path(run)).get("attempt") == result.attempt:
        return
    write_result(store, run, result)
