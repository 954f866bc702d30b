"""The whole journey in one file: a real model, real data, a fine-tune, and what it was worth. Run by `make demo`.

Every step is a command that a person would type. The figures go to `build/demo.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SPEC = "jobs/examples/finance-entities.yaml"
GOAL = 0.4  # entity F1 on held-out rows; the base model starts at 0


def main() -> int:
    began = time.time()
    installed = json.loads((BUILD / "install.json").read_text()) if (BUILD / "install.json").exists() else {}

    step("A local Ray, behind a token, on loopback")
    adaptory("up")
    started = time.time()

    step("SmolLM2-135M learns to answer sentences of financial contracts with their entities as JSON")
    name = free_name("demo")
    adaptory("run", SPEC, "--name", name, "--follow")
    run = asked("runs", "show", name)

    step("The adapter, byte by byte, and the run's curves")
    adapter = run["result"]["adapter"]
    adaptory("adapters", "verify", adapter)
    adaptory("runs", "plot", name, "--out", str(BUILD / "demo.png"))

    figures = figures_of(run, seconds={"install": installed.get("install"), "ray": round(started - began, 1)})
    figures["seconds"]["total"] = round(time.time() - began + (installed.get("install") or 0.0), 1)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    reached = figures["after"]["entity_f1"]
    print(
        f"\nEntity F1 on held-out rows: {figures['before']['entity_f1']:.2f} → {reached:.2f}. Figures: build/demo.json"
    )
    print("Ray is still up for your own runs; `.venv/bin/adaptory down` ends it. The same steps by hand:")
    print(f"  .venv/bin/adaptory run {SPEC} --name mine --follow")
    print(f"  .venv/bin/adaptory adapters export {adapter[:19]} --out my-adapter   # a PEFT directory")
    if reached < GOAL:
        print(f"Expected an entity F1 of at least {GOAL}.", file=sys.stderr)
        return 1
    return 0


def step(text: str) -> None:
    print(f"\n\N{BLACK RIGHT-POINTING TRIANGLE} {text}", flush=True)


def adaptory(*arguments: str) -> None:
    """A command as a person types it; its failure ends the demo with its own words."""
    print(f"$ adaptory {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "orchestrator.cli", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def asked(*arguments: str) -> Any:
    """The same with `--json`."""
    command = [sys.executable, "-m", "orchestrator.cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def free_name(stem: str) -> str:
    """`demo`, or `demo-2`, … when the demo has run before: a run's name is its own for ever."""
    taken = {run["name"] for run in asked("runs", "list")}
    return next(name for name in (stem, *(f"{stem}-{n}" for n in range(2, 1000))) if name not in taken)


def figures_of(run: dict[str, Any], seconds: dict[str, Any]) -> dict[str, Any]:
    result = run["result"]
    evaluation = result["evaluation"]
    return {
        "before": evaluation["before"],
        "after": evaluation["after"],
        "rows": evaluation["rows"],
        "adapter": result["adapter"],
        "metrics": result["metrics"],
        "cpus": os.cpu_count(),
        "seconds": seconds | result["seconds"],
    }


if __name__ == "__main__":
    sys.exit(main())
