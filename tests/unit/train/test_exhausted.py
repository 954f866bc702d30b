"""Real failures of allocations and writes become errors that say what to do. About a second."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jobs.train.exhausted import explained_exhaustion
from orchestrator.errors import DiskFull, OutOfMemory

ENDLESS = 2**50
"""Bytes that no machine has."""


@pytest.mark.parametrize(
    ("allocate", "wanted"),
    [
        (lambda: torch.empty(ENDLESS, dtype=torch.uint8), "(1,073,741,824.0 MiB more were wanted)"),
        (lambda: np.empty(ENDLESS, np.uint8), ""),
        (lambda: bytearray(ENDLESS), ""),
    ],
    ids=["torch", "numpy", "python"],
)
def test_an_allocation_that_fails_names_the_phase_and_what_to_lower(allocate: Any, wanted: str) -> None:
    with pytest.raises(OutOfMemory) as caught, explained_exhaustion("building"):
        allocate()
    assert caught.value.message.startswith("Out of memory while building")
    assert wanted in caught.value.message
    assert "tuning.rank" in str(caught.value.hint)


def test_cuda_says_how_much_in_its_own_unit() -> None:
    with (
        pytest.raises(OutOfMemory, match=r"while training \(2.00 GiB more were wanted\)"),
        explained_exhaustion("training"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")


@pytest.mark.parametrize("how", ["write", "safetensors"])
def test_a_full_disk_is_the_one_with_the_least_room(small_disk: Any, how: str) -> None:
    small_disk.fill()
    path = small_disk.path / "adapter"
    write = {
        "write": lambda: path.write_bytes(b"x" * 2**20),
        "safetensors": lambda: save_file({"w": torch.zeros(2**18)}, path),
    }[how]
    with pytest.raises(DiskFull) as caught, explained_exhaustion("publishing", Path("/"), small_disk.path):
        write()
    assert caught.value.context["path"] == str(small_disk.path)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), OSError(errno.ENOENT, os.strerror(errno.ENOENT))]
)
def test_another_error_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained_exhaustion("training"):
        raise error
    assert caught.value is error
