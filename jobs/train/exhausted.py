"""Memory and disk that run out, as errors that say how much was wanted and what to do. Imports no torch: the driver uses it."""

from __future__ import annotations

import errno
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import OutOfMemory
from orchestrator.store import disk_free, disk_full

_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|out of memory|std::bad_alloc", re.IGNORECASE)
_WANTED = re.compile(r"tried to allocate (?P<number>[\d.]+) (?P<unit>\w+)", re.IGNORECASE)
_LOWER = {
    "loading": "Use a smaller base_model, or a node with more memory.",
    "preparing": "Lower data.limit, or use a node with more memory.",
    "building": "Set train.dtype: bfloat16, tuning.type: qlora or a lower tuning.rank, or deepspeed.stage: 3 with more "
    "resources.workers on other nodes.",
    "training": "Lower train.micro_batch_tokens or tuning.rank, or use more resources.workers on other nodes.",
    "publishing": "The last checkpoint is kept: resume the run on a node with more memory.",
    "evaluating": "Lower evaluate.max_new_tokens, or leave evaluate out; the last checkpoint is kept.",
}


def memory_ran_out(error: BaseException) -> bool:
    """Whether this is an allocation that failed: torch's (CPU or CUDA), NumPy's, Python's or a memory map's."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def memory_wanted(error: BaseException) -> str:
    """` (371.0 MiB more were wanted)`, or nothing where the error does not say."""
    found = _WANTED.search(str(error))
    if not found:
        return ""
    amount = (
        f"{int(found['number']) / 2**20:,.1f} MiB" if found["unit"] == "bytes" else f"{found['number']} {found['unit']}"
    )
    return f" ({amount} more were wanted)"


@contextmanager
def explained_exhaustion(phase: str, *places: Path) -> Iterator[None]:
    """Say which phase of a run did not fit, into memory or onto the disk.

    Args:
        places: directories that the phase writes to; the system's for temporary files is always one.

    Raises:
        OutOfMemory: with what to lower.
        DiskFull: with how much is free where there is least.
    """
    try:
        yield
    except Exception as error:
        if memory_ran_out(error):
            raise OutOfMemory(
                f"Out of memory while {phase}{memory_wanted(error)}.", hint=_LOWER.get(phase), phase=phase
            ) from error
        if disk_ran_out(error):
            raise disk_full(min([*places, Path(tempfile.gettempdir())], key=disk_free)) from error
        raise


def disk_ran_out(error: BaseException) -> bool:
    """Safetensors wraps the system's error in one of its own, which has only its words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and "No space left on device" in str(error)
