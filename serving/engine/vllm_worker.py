"""What runs in vLLM's own workers. Imports nothing of vLLM, which mixes it into its worker (`worker_extension_cls`)."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from typing import Any


class Extension:
    model_runner: Any

    def adaptory_unused_modules(self, number: int) -> list[str]:
        """Modules of a loaded adapter that no linear of the model takes; vLLM itself says nothing of them."""
        manager = self.model_runner.lora_manager._adapter_manager
        return sorted(name for name in manager.get_adapter(number).loras if name not in manager.modules)

    def adaptory_follow(self, owner: int) -> None:
        """End vLLM's processes when that one ends: killed, it leaves them behind, and with them a GPU's memory."""
        threading.Thread(target=_follow, args=(owner, os.getppid()), name="adaptory-follow", daemon=True).start()


def _follow(owner: int, parent: int) -> None:
    """
    Args:
        parent: the engine's process, where a worker is one of its own; else the owner.
    """
    with contextlib.suppress(ProcessLookupError):  # gone already
        select.select([os.pidfd_open(owner)], [], [])
    if parent != owner:
        os.kill(parent, signal.SIGKILL)
    os._exit(1)
