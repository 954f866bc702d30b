"""Ray Train's workers: how many and how large they are, how they are started, and what each of them begins with."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.attempt import Attempt, Logging, write_result
from orchestrator.errors import StoreError
from orchestrator.runs.events import EventWriter
from orchestrator.runs.result import RunResult
from orchestrator.settings import load_settings
from orchestrator.spec.resolved import ResolvedSpec
from orchestrator.store import Store, result_path, spec_path, train_storage_path

if TYPE_CHECKING:
    from cluster.resources import WorkerShape
    from jobs.train.group import EndOnLastingErrors
    from jobs.train.session import Session
    from jobs.train.setup import Place

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
"""Between Ray Train's looks at its workers. `report` waits for the next look, so its default of 2 s stalls every checkpoint."""


def connect(attempt: Attempt, resolved: ResolvedSpec) -> WorkerShape:
    """This process to Ray; says what the run's workers are, and whether they have to wait for nodes."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_SECONDS))
    import ray

    from cluster.resources import cluster_resources, fit

    ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env={"env_vars": _for_workers()})
    shape = fit(resolved.spec.resources, cluster_resources())
    if shape.waits_for:
        attempt.events.emit("message", shape.waits_for)
    elif len(ray.nodes()) == 1:  # where this job's driver runs: if that node goes, nobody is left to be warned
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    return shape


@dataclass(frozen=True)
class Workers:
    """A group of the run's workers.

    Args:
        work: on each worker, in a process that Ray Train starts; gets a dict for `entered`.
        spared: CPUs of each worker that are not reserved, for what runs beside them; it may use them all.
        part: of the attempt, where it has several groups: begins the names by which they log.
        ends: Ray Train's callback that ends the group by what it raises; by default `resources.max_failures` does, besides errors that last.
    """

    attempt: Attempt
    resolved: ResolvedSpec
    shape: WorkerShape
    work: Callable[[dict[str, Any]], Any]
    spared: float = 0.0
    part: str = ""
    ends: EndOnLastingErrors | None = None

    def run(self, **more: Any) -> RunResult:
        """To their end; rank 0 writes the result into the store, or hands it here if that has no room for it.

        Raises:
            AdaptoryError: what ended them.
        """
        import ray.train

        from jobs.train.group import EndOnLastingErrors, explained

        store, shape, most = self.attempt.store, self.shape, self.resolved.spec.resources.max_failures
        storage, filesystem = train_storage(store, self.attempt.run)
        trainer = _trainer_class(shape)(
            self.work,
            train_loop_config={
                "store": store.url,
                "run": self.attempt.run,
                "attempt": self.attempt.number,
                "cpus": shape.cpus_per_worker,
                "gpus": shape.gpus_per_worker,
                "began": self.attempt.began,
                "part": self.part,
                **more,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=shape.workers,
                use_gpu=shape.gpus_per_worker > 0,
                resources_per_worker={"CPU": shape.cpus_per_worker - self.spared}
                | ({"GPU": shape.gpus_per_worker} if shape.gpus_per_worker else {}),
            ),
            run_config=ray.train.RunConfig(
                name="-".join(filter(None, [f"a{self.attempt.number}", self.part])),
                storage_path=storage,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=-1 if self.ends else most),
                callbacks=[self.ends or EndOnLastingErrors()],  # type: ignore[list-item]  # it names Tune's class, and takes its own
            ),
        )
        try:
            unwritten = trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            raise explained(error, most) from error
        return RunResult.model_validate(unwritten or store.read_json(result_path(self.attempt.run)))


def _trainer_class(shape: WorkerShape) -> Any:
    """One worker on a CPU needs no process group, and without one neither this process nor Ray Train's controller imports
    torch: several seconds less before the first step. Otherwise the group is nccl on GPUs and gloo on CPUs."""
    base: Any
    if shape.workers == 1 and not shape.gpus_per_worker:
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as base
    else:
        from ray.train.torch import TorchTrainer as base

    class Trainer(base):
        """Starts no manager of Ray's datasets, which no run has: a process of several seconds' work before the first step. By name, since
        all of it is Ray's own affair: a Ray that calls it otherwise starts it, and trains. The watcher that frees a dead controller's
        reservation stays: after a killed driver one was seen to be held, and the next attempt got no worker."""

        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ != "DatasetsCallback"]

    return Trainer


def _for_workers() -> dict[str, str]:
    """Where this Ray is, for helpers of Ray Train that would else guess it, and give up where a machine has two. And one heap for all
    threads of a process: work is done on a thread that Ray Train starts, and the heaps that glibc gives to such are of 64 MB each,
    which activations fill badly and which come and go (`jobs.train.setup.use_threads` has the main one keep what is freed)."""
    address = os.environ.get("RAY_ADDRESS")
    return {"MALLOC_ARENA_MAX": "1"} | ({"RAY_ADDRESS": address} if address else {})


def train_storage(store: Store, run: str) -> tuple[str, Any]:
    """Where Ray Train and Ray Tune keep their own small files: below the run, in the same store."""
    path = store.full(train_storage_path(run))
    if store.local:
        return path, None
    import pyarrow.fs

    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store.fs))


def give_way(config: dict[str, Any]) -> None:
    """Have this thread, and those that it starts from now on, leave the cores to what answers requests on this machine.

    Training and serving share the cores of a CPU: a reservation would leave some idle, since a server mostly waits. At the
    lowest priority training has all of them while nobody asks, and next to nothing while an answer is computed. The process's
    other threads, by which Ray asks whether it lives, stay as they are. On Linux a thread has its own priority (sched(7)). A worker
    calls this first of all: its imports are seconds of work as well. One with GPUs has little to do but keep them busy.
    """
    if sys.platform.startswith("linux") and not config["gpus"]:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)


_LOWEST = 19


@contextmanager
def entered(config: dict[str, Any], began: float) -> Iterator[Session]:
    """What a worker begins with: its place in the group, its threads, its log, and how it speaks.

    Args:
        began: when its process came to its work, in seconds since the epoch.
    """
    import ray.train

    if not config["gpus"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from who reserves none
    import torch

    from jobs.train.session import Session
    from jobs.train.setup import Place, pass_over_what_stays, use_threads

    imported = time.time()
    use_threads(config["cpus"])
    pass_over_what_stays()
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    store, run, attempt = Store(config["store"]), config["run"], config["attempt"]
    writer = "-".join(filter(None, [config["part"], f"rank{rank}"]))

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
    asked = ResolvedSpec.model_validate(store.read_json(spec_path(run)))
    resolved = _settled(asked, place)

    def report(metrics: dict[str, Any], checkpoint: str) -> None:
        # Words only, no ray.train.Checkpoint: the store owns the bytes, and what is resumed from is found there. Handed even
        # a pointer, Ray Train writes files of its own, and a disk that is full at that moment ends the run.
        ray.train.report(metrics | {"checkpoint": checkpoint})

    with Logging(store, run, attempt, writer):
        events = EventWriter(store, run, attempt, writer) if rank == 0 else None
        try:
            cache = load_settings().cache
            cache.mkdir(parents=True, exist_ok=True)
            seconds = {
                "job_start": round(config["began"] - resolved.created_at, 2),
                "worker_start": round(began - config["began"], 2),
                "imports": round(imported - began, 2),
            }
            session = Session(resolved, attempt, store, cache, place, events, seconds, report)
            if resolved is not asked and resolved.spec.train.dtype == "float32":
                text = "In float32: {} does not multiply bfloat16, which would take several times as long."
                session.say("message", text.format("this GPU" if device.type == "cuda" else "this CPU"))
            yield session
        finally:
            if events:
                events.close()


def _settled(resolved: ResolvedSpec, place: Place) -> ResolvedSpec:
    """With the dtype that is best where rank 0 runs, where the spec leaves it open."""
    from orchestrator.modeling.dtypes import chosen_dtype

    spec = resolved.spec
    if spec.train.dtype != "auto":
        return resolved
    dtype = place.told(chosen_dtype(spec.train.dtype, place.device))
    settled = spec.model_copy(update={"train": spec.train.model_copy(update={"dtype": dtype})})
    return resolved.model_copy(update={"spec": settled})


def handed_in(session: Session, result: RunResult | None) -> dict[str, Any] | None:
    """Write a worker's result; returns one that the store did not take, for the driver to print."""
    if result is None:
        return None
    try:
        write_result(session.store, session.resolved.run, result)
    except StoreError as error:
        log.error("The result could not be written: %s", error)
        return result.model_dump(mode="json")
    return None
