"""The whole journey in one file: a real model, real data, a sweep, its winner behind a route, and what it was worth. Run by
`make demo`.

Every step is a command that a person would type. The figures go to `build/demo.json`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SPEC = "jobs/examples/finance-entities-sweep.yaml"
GOAL = 0.4  # entity F1 on held-out rows; the base model starts at 0


def main() -> int:
    began = time.time()
    installed = json.loads((BUILD / "install.json").read_text()) if (BUILD / "install.json").exists() else {}

    step("A local Ray, behind a token, on loopback")
    adaptory("up", "--no-serve")
    started = time.time()

    step(
        "SmolLM2-135M learns to answer sentences of financial contracts with their entities as JSON: how fast, and for how long?"
    )
    name = free_name("demo")
    adaptory("run", SPEC, "--name", name, "--follow")
    run = asked("runs", "show", name)
    sweep = asked("sweep", "show", name)

    step("Why the winner won, and its adapter byte by byte")
    adapter = run["result"]["adapter"]
    adaptory("sweep", "plot", name, "--out", str(BUILD / "demo"))
    adaptory("adapters", "verify", adapter)

    step("Behind its route, beside the base model, and both asked through OpenAI's client")
    asking = time.time()
    route = f"{run['tenant']}/{yaml.safe_load((ROOT / SPEC).read_text())['serve']['route']}"
    adaptory("routes", "show", route)
    adaptory("up")
    endpoint = asked("status")["serving"]["url"]
    answered = answers(endpoint, route, run)

    seconds = {
        "install": installed.get("install"),
        "ray": round(started - began, 1),
        "serving": round(time.time() - asking, 1),
    }
    figures = figures_of(run, sweep, seconds)
    figures["served"] = answered
    figures["seconds"]["total"] = round(time.time() - began + (installed.get("install") or 0.0), 1)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    reached = figures["after"]["entity_f1"]
    print(
        f"\nEntity F1 on held-out rows: {figures['before']['entity_f1']:.2f} → {reached:.2f}. Figures: build/demo.json"
    )
    print(f"Why {sweep['best']} won: build/demo/*.png")
    print("It is still served, and Ray is up for your own runs; `.venv/bin/adaptory down` ends both. By hand:")
    print(f"  .venv/bin/adaptory chat {route}")
    print(
        f"  export OPENAI_BASE_URL={endpoint} OPENAI_API_KEY=$(.venv/bin/adaptory keys create --name mine)   # any client"
    )
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


def answers(endpoint: str, model: str, run: dict[str, Any]) -> dict[str, Any]:
    """What the base and the route say to the first held-out rows; another adapter's answer ends the demo."""
    from openai import OpenAI

    key = asked("keys", "create", "--name", f"demo-{int(time.time())}", "--expires-in", "1h")["key"]
    client = OpenAI(base_url=endpoint, api_key=key)

    def ask(name: str, messages: list[dict[str, str]], **options: Any) -> tuple[str, Any]:
        asked_for: Any = {"model": name, "messages": messages, "temperature": 0, **options}
        answer = client.chat.completions.with_raw_response.create(**asked_for)
        return answer.parse().choices[0].message.content, answer.headers

    rows = held_out_rows(3)
    while model not in (known := [each.id for each in client.models.list()]):
        time.sleep(0.2)  # a new route is there within two seconds
    _, headers = ask(model, rows[0], max_tokens=1)
    if headers["x-adaptory-adapter"] != run["result"]["adapter"] or headers["x-adaptory-fallback"] != "false":
        sys.exit(f"{model} does not answer with the adapter that was trained: {dict(headers)}")
    bases = [name for name in known if "/" not in name or not name.startswith(f"{run['tenant']}/")]
    base = next(b for b in bases if ask(b, rows[0], max_tokens=1)[1]["x-adaptory-base"] == headers["x-adaptory-base"])

    shown, began = [], time.time()
    for messages in rows:
        said = {name: ask(name, messages, max_tokens=128)[0] for name in (base, model)}
        print(f"\n  {messages[-1]['content'][:200]}")
        for name, text in said.items():
            print(f"    {name:>24}: {' '.join(text.split())[:200]}")
        shown.append({"asked": messages[-1]["content"], **said})
    return {"seconds_per_answer": round((time.time() - began) / (2 * len(rows)), 2), "answers": shown}


def held_out_rows(count: int) -> list[list[dict[str, str]]]:
    """The messages before the answer, of the first rows that training never saw."""
    from jobs.data.checking import reference_rows
    from orchestrator.settings import load_settings

    reference = yaml.safe_load((ROOT / SPEC).read_text())["data"]["test"]
    rows = reference_rows(reference, (ROOT / SPEC).parent, load_settings().cache)
    return [row["messages"][:-1] for row, _ in itertools.islice(rows, count)]


def free_name(stem: str) -> str:
    """`demo`, or `demo-2`, … when the demo has run before: a run's name is its own for ever."""
    taken = {run["name"] for run in asked("runs", "list")}
    return next(name for name in (stem, *(f"{stem}-{n}" for n in range(2, 1000))) if name not in taken)


def figures_of(run: dict[str, Any], sweep: dict[str, Any], seconds: dict[str, Any]) -> dict[str, Any]:
    result = run["result"]
    evaluation = result["evaluation"]
    return {
        "before": evaluation["before"],
        "after": evaluation["after"],
        "rows": evaluation["rows"],
        "adapter": result["adapter"],
        "metrics": result["metrics"],
        "sweep": {name: sweep[name] for name in ("expected", "best", "value", "why", "compute")},
        "cpus": os.cpu_count(),
        "seconds": seconds | result["seconds"],
    }


if __name__ == "__main__":
    sys.exit(main())
