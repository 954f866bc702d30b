"""Our engine behind asyncio, as a gateway uses it; prints one JSON line. `python ours_serve.py --model DIR …`"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import torch
from serving_cases import Batch, options, timed
from transformers import AutoTokenizer

from orchestrator.modeling.decoder import Decoder
from orchestrator.modeling.loading import load_model
from serving.engine.core import EngineCore
from serving.engine.local import LocalEngine
from serving.engine.network import ServedNetwork
from serving.engine.protocol import GenerateRequest, Sampling


async def answers(engine: LocalEngine, batch: Batch, new_tokens: int) -> list[list[int]]:
    sampling = Sampling(max_tokens=new_tokens, ignore_end=True)

    async def one(prompt: list[int], adapter: str | None) -> list[int]:
        request = GenerateRequest(tuple(prompt), adapter, sampling)
        return [token async for event in engine.generate(request) for token in event.tokens]

    return await asyncio.gather(*(one(prompt, adapter) for prompt, adapter in batch))


def main() -> None:
    chosen = options(__doc__)
    torch.set_num_threads(1)  # as in `serving.replica`
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    network = load_model(chosen.model)
    assert isinstance(network, Decoder)
    engine = LocalEngine(EngineCore(ServedNetwork(network), tokenizer, frozenset({tokenizer.eos_token_id})))
    with asyncio.Runner() as runner:
        for path in sorted(chosen.adapters.glob("*/adapter_config.json")):
            runner.run(engine.load_adapter(str(path.parent), Path(path.parent)))
        result = timed(
            chosen, ("mixed", "base", "one"), lambda batch: runner.run(answers(engine, batch, chosen.new_tokens))
        )
        runner.run(engine.close())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
