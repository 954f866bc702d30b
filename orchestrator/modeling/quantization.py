"""4-bit base weights (QLoRA, arXiv:2305.14314). The only module that imports bitsandbytes; it works on a CPU too."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch
from torch import Tensor


class Nf4Weight:
    """A frozen [out, in] weight in NF4; unpacked for each use, since keeping it unpacked would save nothing."""

    def __init__(self, weight: Tensor, *, double_quant: bool, blocksize: int = 64):
        self.shape, self.device = weight.shape, weight.device
        self._packed, self._state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
        )

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """[out, in]."""
        return bnb.dequantize_4bit(self._packed, self._state).to(dtype)


def nf4(*, double_quant: bool) -> Callable[[Tensor], Nf4Weight]:
    """Weight → its 4-bit form. Double quantisation packs the scales of the blocks as well."""
    return lambda weight: Nf4Weight(weight, double_quant=double_quant)
