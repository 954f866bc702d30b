"""Ray Tune over TRL's SFTTrainer with PEFT, one process a trial, as people do it. Prints one JSON line.

`python tune_trl.py --case CASE.json`, in an environment of its own; trains the trials that `measured` of the case names.
"""

import argparse
import json
from pathlib import Path

import tuned


def train(trial: tuned.Case, case: tuned.Case) -> None:
    import os
    import tempfile

    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from ray import tune
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Reporting(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            tune.report(
                tuned.reported(
                    kwargs["metrics"]["eval_loss"], round(state.epoch), trial["epochs"], steps=state.global_step
                )
            )

    torch.set_num_threads(case["threads"])
    rows, held_out = (
        [json.loads(line) for line in Path(case[name]).read_text().splitlines()] for name in ("rows", "validation")
    )
    # A packed sequence holds several rows: as many tokens a step as the rows of a batch have on average.
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=max(1, round(case["batch_size"] * mean / case["pack_length"])),
            num_train_epochs=trial["epochs"],
            max_length=case["pack_length"],
            packing=True,
            learning_rate=trial["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=0.03,  # a share of all steps
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=False,  # the weights may be
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            eval_strategy="epoch",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            seed=0,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(case["model"], dtype=getattr(torch, case["dtype"])),
            args=config,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(held_out),
            processing_class=AutoTokenizer.from_pretrained(case["model"]),
            peft_config=LoraConfig(
                r=case["rank"], lora_alpha=2 * case["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Reporting()],
        )
        trainer.train()
        trainer.save_model(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=Path, required=True)
    options = parser.parse_args()
    case = json.loads(options.case.read_text())
    tuned.answer(tuned.run(train, case, case["measured"], early=False))


if __name__ == "__main__":
    main()
