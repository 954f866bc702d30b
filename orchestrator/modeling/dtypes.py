"""Of activations and frozen weights: which floating-point types there are by name, and which of them the hardware is made for."""

from __future__ import annotations

from typing import Literal

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

DtypeName = Literal["bfloat16", "float32"]

_MULTIPLIES_BF16 = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16")
"""Capabilities of a CPU, as torch calls them: x86's, and ARM's."""


def chosen_dtype(asked: Literal["auto"] | DtypeName, device: torch.device | str) -> DtypeName:
    """`auto`: bfloat16 where the hardware multiplies it (GPUs from compute capability 8.0 on, CPUs with AVX-512 BF16, AMX or
    ARM's BF16), else float32. A CPU without takes each product apart: with AVX2 alone, six times as long as in float32."""
    if asked != "auto":
        return asked
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    return "bfloat16" if _cpu_multiplies_bf16() else "float32"


def _cpu_multiplies_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    found = getattr(torch.cpu, "get_capabilities", None)
    if found is None:  # an older torch
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return any(found().get(name) for name in _MULTIPLIES_BF16)
