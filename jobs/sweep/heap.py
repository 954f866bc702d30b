"""The heap of a process that computes passes beside each other (`jobs.sweep.teams`)."""

from __future__ import annotations

import os
from pathlib import Path

import ray

_SETTINGS = "oversize_threshold:0"
"""By default what has 8 MB or more goes back to the kernel as soon as it is freed, and is zeroed when it comes again."""


def environment() -> dict[str, str]:
    """Variables for such a process, on a CPU: jemalloc, which Ray brings along, in glibc's place.

    Each pass leaves its holes among the other one's tensors, and glibc 2.36 fills them badly: of eight lanes' 3.75 GB at the most, 2.9
    were in use. Empty where a person has said what is to be preloaded, or Ray has none for this system.
    """
    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if "LD_PRELOAD" in os.environ or not library.is_file():
        return {}
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": _SETTINGS}
