"""The loader's own process: real adapters through a real child, and a child that dies or hangs. About 25 seconds."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.errors import AdapterError, AdapterUnavailable
from serving.adapters.loader import Loader
from serving.adapters.process import LoaderProcess

ROOT = Path(__file__).resolve().parents[3]


def with_loader(settings, use, **options):
    async def main():
        loader = LoaderProcess(settings, **options)
        try:
            return await use(loader)
        finally:
            await loader.close()

    return asyncio.run(asyncio.wait_for(main(), timeout=120))


def test_what_arrives_is_what_was_prepared(settings, write, publish):
    digests = [publish(write(seed, rank=rank)) for seed, rank in enumerate((1, 4, 16))]
    loader = Loader(replace(settings, disk=settings.disk.with_name("other")))

    async def use(process):
        loaded = await asyncio.gather(*(process.load(digest) for digest in digests))
        assert [one.from_store for one in loaded] == [True] * 3
        for one, digest in zip(loaded, digests, strict=True):
            expected, _ = loader.load(digest)
            assert one.prepared.pieces == expected.pieces
            assert torch.equal(one.prepared.buffer, expected.buffer)
        assert not (await process.load(digests[0])).from_store
        assert (process.disk.fetches, process.disk.hits, process.starts) == (3, 1, 1)

    with_loader(settings, use)


def test_a_refusal_arrives_as_it_was_raised(settings, write, publish):
    digest = publish(write(rank=17))

    async def use(process):
        with pytest.raises(AdapterError) as caught:
            await process.load(digest)
        assert caught.value.context == {"adapter": digest, "check": "rank"}
        assert caught.value.hint

    with_loader(settings, use)


def test_it_gives_way_to_the_engine_and_its_prints_are_no_replies(settings, write, publish):
    """`print` stands for a signature check that says something on its way; it gets (directory, digest), as one does."""
    settings = replace(settings, requirements=replace(settings.requirements, signature=print), niceness=19)
    digest = publish(write())

    async def use(process):
        loaded = await process.load(digest)
        assert loaded.from_store
        assert os.getpriority(os.PRIO_PROCESS, process._child.process.pid) == 19

    with_loader(settings, use)


async def killed_while_asked(process, digest):
    child = process._child.process
    os.kill(child.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(process.load(digest))
    await asyncio.sleep(0.2)
    os.kill(child.pid, signal.SIGKILL)
    return waiting


def test_what_a_loader_that_dies_was_asked_for_is_loaded_by_another(settings, write, publish):
    digest, slow = publish(write(1)), publish(write(2))

    async def use(process):
        await process.load(digest)
        waiting = await killed_while_asked(process, slow)
        assert (await waiting).from_store
        assert process.starts == 2
        assert process.disk.fetches == 2, "counters go on"

    with_loader(settings, use)


def test_an_adapter_that_kills_its_loader_twice_is_given_up_and_the_next_one_starts_another(settings, write, publish):
    digest, slow = publish(write(1)), publish(write(2))

    async def use(process):
        await process.load(digest)
        waiting = await killed_while_asked(process, slow)
        while process.starts < 2:
            await asyncio.sleep(0.01)
        process._child.process.kill()
        with pytest.raises(AdapterUnavailable, match="died"):
            await waiting
        await process.load(slow)
        assert process.starts == 3

    with_loader(settings, use)


def test_a_loader_that_hangs_is_replaced(settings, write, publish):
    digest = publish(write())

    async def use(process):
        await process.load(digest)
        os.kill(process._child.process.pid, signal.SIGSTOP)
        process.patience = 0.3
        with pytest.raises(AdapterUnavailable, match="not loaded within"):
            await process.load(digest)
        process.patience = 60
        await process.load(digest)
        assert process.starts == 2

    with_loader(settings, use)


def test_closed_it_starts_nothing(settings):
    async def use(process):
        await process.close()
        with pytest.raises(AdapterUnavailable, match="shut down"):
            await process.load("sha256:" + "0" * 64)

    with_loader(settings, use)


def test_it_never_outlives_the_replica(settings, tmp_path):
    """The parent is killed without a chance to say anything."""
    (tmp_path / "settings").write_bytes(pickle.dumps(settings))
    code = """
import asyncio, pickle, sys, time
from pathlib import Path
from serving.adapters.process import LoaderProcess
loader = LoaderProcess(pickle.loads(Path(sys.argv[1]).read_bytes()))
asyncio.run(loader.start())
print(loader._child.process.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "settings")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60  # it may be importing still
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
