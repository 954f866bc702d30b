"""Time of the base model's matmuls alone, forward and input gradient, in bf16; prints one JSON line.

`python matmul_floor.py --model DIR --micro-batches '[[tokens, labelled], …]'`: every linear of every layer on `tokens` rows, the
output head on `labelled` rows, with the model's own weights so that the caches see what training sees. No weight
gradient (the base is frozen) and no input gradient where nothing trainable lies below: the first layer's q, k and v.
What follows attention in the last layer is needed for labelled rows alone.
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path

import torch
from safetensors import safe_open


def weights(model: Path) -> list[tuple[torch.Tensor, bool, bool]]:
    """`(weight [out, in], labelled_rows_only, needs_input_gradient)` in the order of a forward pass."""
    tied = json.loads((model / "config.json").read_text()).get("tie_word_embeddings", False)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    found = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                if name == head or re.search(r"layers\.\d+\..*_proj\.weight$", name):
                    found[name] = tensors.get_tensor(name).to(torch.bfloat16)
    lowest = re.compile(r"layers\.0\.self_attn\.[qkv]_proj")
    last = max(int(match[1]) for name in found if (match := re.search(r"layers\.(\d+)\.", name)))
    late = re.compile(rf"layers\.{last}\.(mlp\.|self_attn\.o_proj)")
    return [
        (weight, name == head or bool(late.search(name)), not lowest.search(name)) for name, weight in found.items()
    ]


def one_pass(layers: list[tuple[torch.Tensor, bool, bool]], micro_batches: list[list[int]]) -> float:
    """Seconds for the matmuls of all micro-batches."""
    total = 0.0
    for tokens, labelled in micro_batches:
        inputs = {(rows, width): torch.randn(rows, width, dtype=torch.bfloat16)
                  for weight, _, _ in layers for width in weight.shape for rows in (tokens, labelled)}  # fmt: skip
        start = time.perf_counter()
        for weight, few, _ in layers:
            torch.nn.functional.linear(inputs[labelled if few else tokens, weight.shape[1]], weight)
        for weight, few, needs_gradient in reversed(layers):
            if needs_gradient:
                inputs[labelled if few else tokens, weight.shape[0]] @ weight
        total += time.perf_counter() - start
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--micro-batches", type=json.loads, required=True, help="[[tokens, labelled tokens], …]")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    layers = weights(options.model)
    with torch.no_grad():
        one_pass(layers, options.micro_batches[:1])
        seconds = statistics.median(one_pass(layers, options.micro_batches) for _ in range(options.repeats))
    tokens = sum(tokens for tokens, _ in options.micro_batches)
    print(json.dumps({"seconds_per_token": seconds / tokens, "tokens_per_second": tokens / seconds}))


if __name__ == "__main__":
    main()
