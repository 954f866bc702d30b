"""The job's entry point: `python -m jobs.train --store URL --run ID --attempt N`. Starts the workers and waits for them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from jobs.train.exhausted import explained_exhaustion
from jobs.train.fence import check_still_ours
from orchestrator.errors import AdaptoryError, StoreError, Superseded
from orchestrator.runs.events import EventWriter
from orchestrator.runs.logs import StoreLogHandler
from orchestrator.runs.result import RunResult, last_words
from orchestrator.runs.states import RunState
from orchestrator.settings import load_settings
from orchestrator.spec.resolved import ResolvedSpec
from orchestrator.store import Store, result_path, spec_path, train_storage_path

if TYPE_CHECKING:
    from cluster.resources import WorkerShape

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
"""Between Ray Train's looks at its workers. `report` waits for the next look, so its default of 2 s stalls every checkpoint."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when the attempt ended as it should (paused included), 1 when it failed; the result says why."""
    began = time.time()
    parser = argparse.ArgumentParser(prog="python -m jobs.train")
    parser.add_argument("--store", required=True, help="URL of the artifact store")
    parser.add_argument("--run", required=True, help="run id")
    parser.add_argument("--attempt", required=True, type=int)
    options = parser.parse_args(arguments)
    store = Store(options.store)
    with _Logging(store, options.run, options.attempt, "driver"):
        events = EventWriter(store, options.run, options.attempt, "driver")
        try:
            with explained_exhaustion("starting"):
                result = _run(store, options.run, options.attempt, events, began)
        except AdaptoryError as error:
            log.error("%s", error)
            events.emit("message", str(error), level="error")
            result = _failed(options.attempt, error)
        finally:
            events.close()
        try:
            _write_unless_there(store, options.run, result)
        except Superseded as error:
            log.warning("%s", error)
        except StoreError as error:
            log.error("The result could not be written: %s", error)
            sys.stdout.write(
                f"\n{last_words(result)}\n"
            )  # Ray keeps what a job prints, and the control plane looks there
            sys.stdout.flush()
    return 1 if result.state is RunState.FAILED else 0


def _run(store: Store, run: str, attempt: int, events: EventWriter, began: float) -> RunResult:
    """Start Ray Train's workers; rank 0 writes the result into the store, or hands it here if that has no room for it."""
    resolved = ResolvedSpec.model_validate(store.read_json(spec_path(run)))
    events.emit("state", "The job has started.", state="running")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_SECONDS))
    import ray
    import ray.train

    from cluster.resources import cluster_resources, fit
    from jobs.train.group import EndOnLastingErrors, explained

    ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env={"env_vars": _for_workers()})
    shape = fit(resolved.spec.resources, cluster_resources())
    if shape.waits_for:
        events.emit("message", shape.waits_for)
    elif len(ray.nodes()) == 1:  # where this job's driver runs: if that node goes, nobody is left to be warned
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    storage, filesystem = _train_storage(store, run)
    trainer = _trainer_class(shape)(
        _worker,
        train_loop_config={
            "store": store.url,
            "run": run,
            "attempt": attempt,
            "cpus": shape.cpus_per_worker,
            "gpus": shape.gpus_per_worker,
            "began": began,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=shape.workers,
            use_gpu=shape.gpus_per_worker > 0,
            resources_per_worker={"CPU": shape.cpus_per_worker}
            | ({"GPU": shape.gpus_per_worker} if shape.gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(
            name=f"a{attempt}",
            storage_path=storage,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=resolved.spec.resources.max_failures),
            callbacks=[EndOnLastingErrors()],  # type: ignore[list-item]  # it names Tune's class, and takes its own
        ),
    )
    events.emit("phase", phase="waiting for workers")
    try:
        unwritten = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise explained(error, resolved.spec.resources.max_failures) from error
    return RunResult.model_validate(unwritten or store.read_json(result_path(run)))


def _trainer_class(shape: WorkerShape) -> Any:
    """One worker on a CPU needs no process group, and without one neither this process nor Ray Train's controller imports
    torch: several seconds less before the first step. Otherwise the group is nccl on GPUs and gloo on CPUs."""
    if shape.workers == 1 and not shape.gpus_per_worker:
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        return DataParallelTrainer
    from ray.train.torch import TorchTrainer

    return TorchTrainer


def _for_workers() -> dict[str, str]:
    """Where this Ray is, for helpers of Ray Train that would else guess it, and give up where a machine has two."""
    address = os.environ.get("RAY_ADDRESS")
    return {"RAY_ADDRESS": address} if address else {}


def _worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """On each worker, in a process that Ray Train started; what it returns is a result that the store did not take."""
    entered = time.time()
    import ray.train
    import torch

    from jobs.train.session import Session
    from jobs.train.setup import Place, give_way, use_threads
    from jobs.train.worker import run_worker

    imported = time.time()
    if not config["gpus"]:  # else its threads have little to do but keep a GPU busy
        give_way()
    use_threads(config["cpus"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    store, run, attempt = Store(config["store"]), config["run"], config["attempt"]

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        if workers > 1:
            moved = tensor.to(place.device)
            torch.distributed.all_reduce(moved)
            tensor = moved.to(tensor.device)
        return tensor

    device = torch.device("cpu")
    if config["gpus"]:
        from ray.train.torch import get_device

        device = get_device()
    place = Place(rank=rank, workers=workers, device=device, all_reduce=all_reduce)
    resolved = ResolvedSpec.model_validate(store.read_json(spec_path(run)))

    def report(metrics: dict[str, Any], checkpoint: str) -> None:
        # Words only, no ray.train.Checkpoint: the store owns the bytes, and what is resumed from is found there. Handed even
        # a pointer, Ray Train writes files of its own, and a disk that is full at that moment ends the run.
        ray.train.report(metrics | {"checkpoint": checkpoint})

    with _Logging(store, run, attempt, f"rank{rank}"):
        events = EventWriter(store, run, attempt, "rank0") if rank == 0 else None
        try:
            cache = load_settings().cache
            cache.mkdir(parents=True, exist_ok=True)
            seconds = {
                "job_start": round(config["began"] - resolved.created_at, 2),
                "worker_start": round(entered - config["began"], 2),
                "imports": round(imported - entered, 2),
            }
            result = run_worker(Session(resolved, attempt, store, cache, place, events, seconds, report))
        finally:
            if events:
                events.close()
        if result:
            try:
                write_result(store, run, result)
            except StoreError as error:
                log.error("The result could not be written: %s", error)
                return result.model_dump(mode="json")
    return None


class _Logging:
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


def _train_storage(store: Store, run: str) -> tuple[str, Any]:
    """Where Ray Train keeps its own small files: below the run, in the same store."""
    path = store.full(train_storage_path(run))
    if store.local:
        return path, None
    import pyarrow.fs

    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store.fs))


def write_result(store: Store, run: str, result: RunResult) -> None:
    """The last word of an attempt.

    Raises:
        Superseded: a newer attempt owns the run.
    """
    check_still_ours(store, run, result.attempt)
    store.write_json(result_path(run), result.model_dump(mode="json"))


def _failed(attempt: int, error: AdaptoryError) -> RunResult:
    return RunResult(attempt=attempt, state=RunState.FAILED, error=error.to_dict(), finished_at=time.time())


def _write_unless_there(store: Store, run: str, result: RunResult) -> None:
    if store.exists(result_path(run)) and store.read_json(result_path(run)).get("attempt") == result.attempt:
        return
    write_result(store, run, result)


def cli() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
