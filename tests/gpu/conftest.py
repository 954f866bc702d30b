"""Tests of the other folders once more, on a GPU, and those that only a GPU can answer. `make test-gpu`.

The same functions are collected here, with another `device`. DeepSpeed, bitsandbytes and their tests are left out where they are
not installed. `TEST_DEVICE=cpu` runs what does not ask for CUDA itself, which shows that the tests are sound.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.integration.conftest import heard, killed, make_job
from tests.unit.engine.conftest import greedy, make_engine, peft_adapters, prompts, run, stock
from tests.unit.sweep.conftest import alike_rows, place, rows, validation_rows
from tests.unit.train.conftest import make_rows

__all__ = [
    "alike_rows", "greedy", "heard", "killed", "make_engine", "make_job", "make_rows", "peft_adapters", "place", "prompts",
    "rows", "run", "stock", "validation_rows",
]  # fmt: skip

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
MISSING = (
    f"torch {torch.__version__} sees no CUDA device here. On a machine with an NVIDIA GPU, install a build of torch for it: "
    ".venv/bin/python -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
)


def pytest_sessionstart() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.exit(MISSING, returncode=2)


@pytest.fixture(scope="session")
def device() -> str:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip(MISSING)
    return DEVICE


@pytest.fixture
def cuda(device: str) -> torch.device:
    """For tests of what only CUDA has."""
    if device != "cuda":
        pytest.skip("asks for CUDA itself")
    return torch.device(device)
