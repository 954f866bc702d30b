"""The engine's own side of `http_overhead`: the replica's engine alone on its core, behind asyncio, without Ray and HTTP.

The case comes as one line of JSON on standard input, then one line for each batch; each is answered with one line.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from setting_up import http_options

from orchestrator.modeling.prompts import load_tokenizer
from orchestrator.store import Store, adapter_path
from serving.engine.protocol import Engine, GenerateRequest, Sampling
from serving.gateway.prompts import Prompts
from serving.replica import EngineReplica


async def main() -> None:
    case = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, {case["core"]})
    options = http_options(case, case["digest"])
    engine = EngineReplica(options, "alone").engine
    prompts = Prompts(load_tokenizer(case["model"]), options.max_length)
    store = Store(options.store_url)
    for digest in case["digests"]:
        directory = Path(case["home"]) / "alone" / digest
        if not directory.exists():
            store.fetch(adapter_path(digest), directory)
        await engine.load_adapter(digest, directory)
    print(json.dumps({"ready": True}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await answers(engine, prompts, json.loads(line))), flush=True)
    await engine.close()


async def answers(engine: Engine, prompts: Prompts, batch: dict[str, Any]) -> dict[str, float]:
    """Seconds until the first token of the last to get one, and until all is answered."""
    sampling = Sampling(max_tokens=batch["tokens"], ignore_end=True)
    asked = [
        GenerateRequest(prompts.chat([{"role": "user", "content": text}]), digest, sampling)
        for text, digest in zip(batch["texts"], batch["digests"], strict=True)
    ]

    async def one(request: GenerateRequest) -> float:
        first, count = 0.0, 0
        async for event in engine.generate(request):
            first, count = first or time.perf_counter(), count + len(event.tokens)
        assert count == batch["tokens"]
        return first

    start = time.perf_counter()
    firsts = await asyncio.gather(*map(one, asked))
    return {"first": max(firsts) - start, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    asyncio.run(main())
