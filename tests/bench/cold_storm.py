"""What 200 cold adapters cost the tenants whose adapters are warm: time between tokens, beside the same with all resident.

Eight tenants stream answers over SmolLM2-135M while 200 others, each with an adapter of its own, ask for a short one: all at
once, and then spread over some seconds. The engine's thread has a core of its own; everything else shares the other one.
Each measurement is a process of its own: once the 200 must come from the store, through every check, and once they are in
the engine already. The ratio is that of the warm tenants' p99 time between tokens until the last of the 200 is answered, median
over the pairs, the worse of the two patterns. Beside it Ray Serve's `@serve.multiplexed` over the same engine, which loads what it is
asked for without any check, against itself in the same way.

The last line is `cold_storm ratio=… at_once=… spread=… multiplexed=… multiplexed_at_once=… multiplexed_spread=…
engine_us=…`: `engine_us` are microseconds of the engine's thread for each adapter loaded.

Needs two idle cores, 3 GB of disk in build/ and 3 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIDES = Path(__file__).parent / "sides"
BUILD = ROOT / "build" / "bench" / "cold_storm"
PATTERNS = ("at_once", "spread")
ARMS = ("ours", "multiplexed")

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold", type=int, default=200, help="adapters that are asked for")
    parser.add_argument("--warm", type=int, default=8, help="tenants that stream all the while")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=8, help="of each answer with a cold adapter")
    parser.add_argument("--seconds", type=float, default=30.0, help="over which the spread pattern asks")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--model", type=Path, help="directory of the base model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = parser.parse_args()
    model = options.model or base_model()
    case = {
        "model": str(model),
        "store": str(BUILD / "store"),
        "adapters": publish_adapters(model, options.warm + options.cold, options.rank),
        "base_digest": base_digest(model),
        "warm": options.warm,
        "new_tokens": options.new_tokens,
        "engine_core": min(os.sched_getaffinity(0)),
    }
    ratios: dict[str, dict[str, list[float]]] = {arm: {pattern: [] for pattern in PATTERNS} for arm in options.arms}
    engine_us: list[float] = []
    for pair in range(options.pairs):
        for arm in options.arms:
            for pattern in PATTERNS:
                asked = case | {"spread": options.seconds if pattern == "spread" else 0.0}
                cold = measure(arm, asked | {"resident": False})
                resident = measure(arm, asked | {"resident": True})
                ratios[arm][pattern].append(cold["p99_ms"] / resident["p99_ms"])
                engine_us += cold["engine_us"] if arm == "ours" else []
                print(f"pair {pair + 1}, {arm}, {pattern}: p99 {cold['p99_ms']:.0f} ms cold, {resident['p99_ms']:.0f} ms resident; "
                      f"the last answered after {cold['seconds']:.1f} s and {resident['seconds']:.1f} s", flush=True)  # fmt: skip
    report(ratios, engine_us)


def report(ratios: dict[str, dict[str, list[float]]], engine_us: list[float]) -> None:
    """Medians of the ratios within each pair; the last line."""
    shown = []
    for arm, patterns in ratios.items():
        medians = {pattern: statistics.median(values) for pattern, values in patterns.items()}
        prefix = "" if arm == "ours" else f"{arm}_"
        shown.append(f"{'ratio' if arm == 'ours' else arm}={max(medians.values()):.2f}")
        shown += [f"{prefix}{pattern}={value:.2f}" for pattern, value in medians.items()]
    if engine_us:
        shown.append(f"engine_us={statistics.median(engine_us):.0f}")
    print("cold_storm", *shown)


def measure(arm: str, case: Result) -> Result:
    """One storm in a process of its own, with an empty disk tier; the last line it prints is JSON.

    Raises:
        SystemExit: it failed; the message ends with what it said.
    """
    disk = BUILD / "disk"
    shutil.rmtree(disk, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, str(SIDES / f"storm_{arm}.py")],
        input=json.dumps(case | {"disk": str(disk)}),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{SIDES}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=1800,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{arm} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- set-up ---------------------------------------------------------------------------------------------------------


def base_model() -> Path:
    from orchestrator.modeling.base_model import materialize
    from orchestrator.settings import load_settings

    return materialize("smollm2-135m-instruct", cache=load_settings().cache, say=print).path


def base_digest(model: Path) -> str:
    from orchestrator.modeling.base_model import materialize
    from orchestrator.settings import load_settings

    return materialize(str(model), cache=load_settings().cache).digest


def publish_adapters(model: Path, count: int, rank: int) -> list[str]:
    """Digests of adapters in the store, of every linear and in bf16; those that are there already are kept."""
    import torch

    from orchestrator.modeling.adapter_check import base_modules
    from orchestrator.modeling.adapter_files import AdapterConfig, adapter_digest, write_adapter
    from orchestrator.store import Store, adapter_path

    store, base, listing = Store(str(BUILD / "store")), base_digest(model), BUILD / f"rank-{rank}.json"
    known: dict[str, list[str]] = json.loads(listing.read_text()) if listing.exists() else {}
    digests = known.setdefault(base, [])
    linears = {n: s for n, s in sorted(base_modules(model).items()) if n != "lm_head"}
    config = AdapterConfig(rank, 2.0 * rank, tuple(sorted({n.rpartition(".")[2] for n in linears})))
    while len(digests) < count:
        generator, tensors = torch.Generator().manual_seed(len(digests)), {}
        for name, (out, width) in linears.items():
            tensors[f"{name}.lora_A.weight"] = (torch.randn(rank, width, generator=generator) * 0.02).bfloat16()
            tensors[f"{name}.lora_B.weight"] = (torch.randn(out, rank, generator=generator) * 0.02).bfloat16()
        directory = BUILD / "new"
        shutil.rmtree(directory, ignore_errors=True)
        write_adapter(directory, config, tensors)
        digest = adapter_digest(directory, base)
        store.publish(adapter_path(digest), directory, {"kind": "lora", "base_digest": base, "rank": rank})
        digests.append(digest)
        listing.write_text(json.dumps(known))
    return digests[:count]


if __name__ == "__main__":
    main()
