"""Publishes what was trained: written, loaded back, compared with the trained model, evaluated, then put into the store."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.data import PreparedData
from jobs.train.artifact import PUBLISHED, check_same, load_adapter, write_full_weights, write_trained_adapter
from jobs.train.evaluation import evaluate, fresh
from jobs.train.fence import check_still_ours
from jobs.train.session import Session
from jobs.train.setup import Trainable, give_back_freed_memory
from orchestrator.modeling.base_model import BaseModel
from orchestrator.modeling.decoder import Decoder, adapter_tensors
from orchestrator.modeling.dtypes import DTYPES
from orchestrator.modeling.loading import full_tensors, load_model
from orchestrator.modeling.plain import PlainDecoder
from orchestrator.registry.adapters import publish_adapter, publish_weights
from orchestrator.registry.provenance import BaseModelRecord, Provenance, SweepRecord
from orchestrator.runs.result import EvaluationResult, RunResult
from orchestrator.runs.states import RunState
from orchestrator.spec.job import FullTuning


def publish(session: Session, trainable: Trainable, base: BaseModel, tokenizer: Any, data: PreparedData) -> RunResult:
    """From the trained weights in memory to the run's result. The ranks part here: only rank 0 goes on past the gathering.

    Raises:
        AdapterError: what the files say is not what was trained, not finite, or without effect: nothing is published.
        Superseded: a newer attempt owns the run.
    """
    spec, device = session.spec, session.place.device
    probe = torch.from_numpy(np.array(data.train[0].ids, dtype=np.int64)).to(device)
    keep = torch.arange(len(probe), device=device)
    trainable.model.eval()
    with torch.no_grad():
        trained = trainable.model.logits(probe, keep, trainable.slot).float()
    state = trainable.engine.state()  # every rank takes part
    if state is None:
        return session.result(RunState.SUCCEEDED)
    full = isinstance(spec.tuning, FullTuning)
    give_back_freed_memory()
    with tempfile.TemporaryDirectory(prefix="adaptory-", dir=session.cache) as folder:
        directory = Path(folder) / "artifact"
        with session.phase("publishing"):
            write_artifact(directory, session, trainable, base, state["weights"])
            published = loaded_back(directory, session, trainable, base)
            probes = check_same(
                trained,
                lambda: published.logits(probe, keep, None if full else PUBLISHED).float(),
                lambda: (fresh(session, base) if full else published).logits(probe, keep, None).float(),
                tolerance=0.0 if published is trainable.network else 1e-4 if spec.train.dtype == "float32" else 2e-2,
            )
        return publish_checked(session, directory, published, base, tokenizer, data, probes)


def publish_checked(
    session: Session,
    directory: Path,
    published: Decoder | PlainDecoder,
    base: BaseModel,
    tokenizer: Any,
    data: PreparedData,
    probes: dict[str, float],
    sweep: SweepRecord | None = None,
) -> RunResult:
    """Evaluate what was written and loaded back, and put it into the store.

    Args:
        published: a network that holds what the files in `directory` say.
        probes: what was measured when they were compared.
    """
    evaluation = evaluate(session, published, directory, base, tokenizer, data) if session.spec.evaluate else None
    with session.phase("publishing"):
        check_still_ours(session.store, session.resolved.run, session.attempt)
        provenance = _provenance(session, base, data, evaluation, probes, sweep)
        if isinstance(session.spec.tuning, FullTuning):
            digest = publish_weights(session.store, directory, provenance)
        else:
            digest = publish_adapter(session.store, directory, base.digest, provenance, base=base.path)
    return session.result(RunState.SUCCEEDED, adapter=digest, evaluation=evaluation)


def write_artifact(
    directory: Path, session: Session, trainable: Trainable, base: BaseModel, masters: dict[str, Tensor]
) -> None:
    """What was trained, in the dtype of training: exactly what the forward pass used."""
    tuning, dtype = session.spec.tuning, DTYPES[session.spec.train.dtype]
    values = {name: value.to(dtype) for name, value in masters.items()}
    if isinstance(tuning, FullTuning):
        write_full_weights(directory, base.path, full_tensors(trainable.network, values))
    else:
        assert trainable.slot is not None
        tensors = adapter_tensors(trainable.network, trainable.slot, values)
        write_trained_adapter(directory, tuning, base.loadable_name, tensors)


def loaded_back(directory: Path, session: Session, trainable: Trainable, base: BaseModel) -> Decoder | PlainDecoder:
    """A network that holds what the files say: the trained one with one more slot, or a fresh one."""
    spec = session.spec
    if isinstance(spec.tuning, FullTuning):
        return load_model(directory, dtype=DTYPES[spec.train.dtype], device=session.place.device).eval()
    whole = trainable.model is trainable.network or spec.deepspeed.stage != 3
    network = trainable.network if whole else fresh(session, base)
    load_adapter(network, PUBLISHED, directory)
    return network.eval()


def _provenance(
    session: Session,
    base: BaseModel,
    data: PreparedData,
    evaluation: EvaluationResult | None,
    probes: dict[str, float],
    sweep: SweepRecord | None,
) -> Provenance:
    return Provenance.of(
        session.resolved,
        BaseModelRecord(
            reference=session.spec.base_model,
            digest=base.digest,
            model_type=base.model_type,
            loadable_name=base.loadable_name if base.source == "hub" else None,
        ),
        attempt=session.attempt,
        step=session.progress.step,
        metrics=session.metrics() | probes,
        evaluation=evaluation,
        data=data.report.sources,
        hardware={"workers": session.place.workers, "device": session.place.device.type},
        sweep=sweep,
    )
