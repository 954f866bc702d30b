"""Ray Serve's side of `cold_storm`: `@serve.multiplexed` over the same engine, as its documentation has it.

The storm runs inside the replica, as ours runs inside its process, so neither side pays for a way to the replica.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from application import own_ray
from storm import Case, keep_off_the_engines_core, start_engine, storm, tokens

from orchestrator.store import Store, adapter_path


def deployment(adapters: int) -> Any:
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 1})
    class Replica:
        def __init__(self, case: Case):
            self.case = case
            self.engine, self.spent = start_engine(case)
            self.store, self.disk = Store(case["store"]), Path(case["disk"])

        @serve.multiplexed(max_num_models_per_replica=adapters)
        async def adapter(self, digest: str) -> str:
            directory = self.disk / digest.removeprefix("sha256:")
            await asyncio.to_thread(self.store.fetch, adapter_path(digest), directory)
            await self.engine.load_adapter(digest, directory)
            return digest

        async def ask(self, digest: str, new: int) -> AsyncIterator[float]:
            await self.adapter(digest)
            async for now in tokens(self.engine, digest, new):
                yield now

        async def run(self) -> dict[str, Any]:
            case = self.case
            for digest in case["adapters"] if case["resident"] else case["adapters"][: case["warm"]]:
                await self.adapter(digest)
            self.spent.clear()
            result = await storm(case, self.ask)
            await self.engine.close()
            return result | {"engine_us": self.spent}

    return Replica


def main(case: Case) -> None:
    from ray import serve

    with own_ray({"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}):
        serve.start(http_options={"location": "NoServer"})
        handle = serve.run(deployment(len(case["adapters"])).bind(case))
        result = handle.run.remote().result(timeout_s=1200)
    print(json.dumps(result))  # last: Ray says goodbye on standard output, too


if __name__ == "__main__":
    keep_off_the_engines_core()
    main(json.load(sys.stdin))
