"""What the training loop needs of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from orchestrator.modeling.attention import Documents
from orchestrator.modeling.lora import Segment


class Network(Protocol):
    """The fused `Decoder`, the `PlainDecoder`, or the `ZeroEngine` that stands for either on several workers."""

    packs: bool
    """Takes several documents in one forward pass."""

    def loss(
        self,
        ids: Tensor,
        attention: Documents,
        labels: Tensor,
        at: Tensor,
        token_weights: Tensor,
        segments: Sequence[Segment] = (),
        /,
    ) -> tuple[Tensor, Tensor]:
        """Weighted next-token loss of packed documents.

        Args:
            ids: [tokens].
            labels: [labelled], the token that should follow each position of `at`.
            at: [labelled], positions in the packed batch, ascending.
            token_weights: [labelled], fp32.

        Returns:
            The weighted sum, and each token's loss ([labelled], fp32).
        """

    def logits(self, ids: Tensor, keep: Tensor, slot: str | None, /) -> Tensor:
        """Logits of one document at positions `keep`: ids [tokens] → [kept, vocab]."""

    def train(self) -> Any: ...
    def eval(self) -> Any: ...
