"""Lets transformers read a config without importing what a model needs.

Since 5.x each architecture's config imports `utils.type_validators`, and that, only to check the name of an activation,
`activations`, the kernel hub, flash attention and torch's compiler: over three seconds, which a run's first step would wait
for. Where torch seems to be missing it skips that check. https://github.com/huggingface/transformers, utils/type_validators.py
"""

from __future__ import annotations

import sys


def prepare() -> None:
    """To be called before the first config or tokenizer is loaded; afterwards it does nothing."""
    if "transformers.utils.type_validators" in sys.modules:
        return
    import torch
    from transformers import tokenization_utils_base, video_utils  # noqa: F401 - what it imports must see torch
    from transformers.utils import import_utils

    there = import_utils.is_torch_available
    import_utils.is_torch_available = lambda: False
    try:
        from transformers.utils import type_validators
    finally:
        import_utils.is_torch_available = there
    type_validators.is_torch_available, type_validators.torch = there, torch
