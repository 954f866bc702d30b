"""TRL's SFTTrainer with PEFT over given token rows; prints one JSON line. Runs in an environment of its own.

`python trl_train.py --model DIR --rows ROWS.jsonl --steps N --mode pad --micro-batch 4`. Each line of ROWS.jsonl is
`{"input_ids": [...], "labels": [...]}`; TRL takes the tokens as they are, so both sides of the benchmark learn the same.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

MODES = ("pad", "grouped", "packed", "padding-free")


class Measured(SFTTrainer):
    """Counts real tokens and takes the time of each optimiser step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens, self.steps = 0, []

    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        self.tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs, *args, **kwargs):  # logging_steps=1: once after each optimiser step
        if "loss" in logs:
            self.steps.append({"time": time.perf_counter(), "tokens": self.tokens, "loss": float(logs["loss"])})
        super().log(logs, *args, **kwargs)


def trainer(options: argparse.Namespace) -> Measured:
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation=options.attention
    )
    accumulation, max_length = options.batch_size // options.micro_batch, max(len(row["input_ids"]) for row in rows)
    if options.mode == "packed":
        # A packed sequence holds several rows: as many tokens a step as the rows of a global batch have on average.
        mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
        max_length = max(options.pack_length, max_length)
        accumulation = max(1, round(options.batch_size * mean / (max_length * options.micro_batch)))
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=options.steps,
        max_length=None if options.mode == "padding-free" else max_length,  # TRL refuses it there; no row is longer
        packing=options.mode == "packed",
        padding_free=options.mode == "padding-free",
        train_sampling_strategy="group_by_length" if options.mode == "grouped" else "sequential",
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=options.autocast,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        seed=0,
    )
    return Measured(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps, the warm-up ones included")
    parser.add_argument("--warmup-steps", type=int, default=1, help="steps left out of the time")
    parser.add_argument("--mode", choices=MODES, default="pad")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--pack-length", type=int, default=512, help="tokens of a packed sequence")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per optimiser step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast, instead of plain bf16 weights")
    parser.add_argument("--threads", type=int, help="default: torch's own")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    training = trainer(options)
    training.train()
    first, last = training.steps[options.warmup_steps - 1], training.steps[-1]
    print(
        json.dumps(
            {
                "tokens_per_second": (last["tokens"] - first["tokens"]) / (last["time"] - first["time"]),
                "tokens": last["tokens"],
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "losses": [step["loss"] for step in training.steps],
            }
        )
    )


if __name__ == "__main__":
    main()
