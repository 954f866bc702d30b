"""transformers' generate on a padded batch with PEFT's `adapter_names`; prints one JSON line. `python peft_serve.py --model DIR …`"""

from __future__ import annotations

import json

import torch
from peft import PeftModel
from serving_cases import Batch, options, timed
from transformers import AutoModelForCausalLM


def main() -> None:
    chosen = options(__doc__)
    base = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.bfloat16)
    directories = sorted(str(path.parent) for path in chosen.adapters.glob("*/adapter_config.json"))
    model = PeftModel.from_pretrained(base, directories[0], adapter_name=directories[0])
    for directory in directories[1:]:
        model.load_adapter(directory, adapter_name=directory)
    model.eval()

    @torch.inference_mode()
    def answer(batch: Batch) -> list[list[int]]:
        ids = torch.tensor([prompt for prompt, _ in batch])  # of equal length, so there is no padding
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=[adapter or "__base__" for _, adapter in batch],
            max_new_tokens=chosen.new_tokens,
            min_new_tokens=chosen.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].tolist()

    print(json.dumps(timed(chosen, ("mixed",), answer)))


if __name__ == "__main__":
    main()
