"""What runs in vLLM's own workers: a question about an adapter. Imports nothing of vLLM, which mixes it into its worker."""

from __future__ import annotations

from typing import Any


class LoraReport:
    """vLLM's `worker_extension_cls`."""

    model_runner: Any

    def adaptory_unused_modules(self, number: int) -> list[str]:
        """Modules of a loaded adapter that no linear of the model takes; vLLM itself says nothing of them."""
        manager = self.model_runner.lora_manager._adapter_manager
        return sorted(name for name in manager.get_adapter(number).loras if name not in manager.modules)
