"""The heap of a packed group's worker."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jobs.sweep import heap

PROGRAM = """
import torch
from pathlib import Path

torch.nn.functional.relu(torch.randn(512, 512) @ torch.randn(512, 512)).sum()
print("libjemalloc" in Path("/proc/self/maps").read_text())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Ray brings jemalloc along on Linux alone")
def test_a_process_computes_with_ray_s_jemalloc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the loader has to say about it (a library that is not there, an option that is unknown) is said on stderr."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    everything = os.environ | heap.environment()
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=everything, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_what_a_person_preloads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/libtcmalloc.so")
    assert heap.environment() == {}
