"""What is predicted: the next token, or masked tokens in both directions.

Shapes: B batch, S sequence.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from moe_lab.config import option


@option("objective", "clm")
class CLM:
    """Causal language modelling: every token is predicted from those before it."""

    causal = True
    extra_tokens = 0
    counted = 1.0  # share of the tokens that carry a loss

    def targets(self, ids: Tensor, vocab_size: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, S+1] -> inputs [B, S], targets [B, S], and which targets count [B, S] (bool)."""
        return ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool)


@option("objective", "mlm")
class MLM:
    """Masked language modelling (BERT, arXiv 1810.04805), bidirectional; every hidden token shows one mask token."""

    causal = False
    extra_tokens = 1  # the mask token, behind the dataset's vocabulary

    def __init__(self, *, mask_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15):
        self.mask_fraction = self.counted = mask_fraction

    def targets(self, ids: Tensor, vocab_size: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        inputs = ids[:, :-1]
        B, S = inputs.shape
        hidden = torch.rand((B, S), generator=g) < self.mask_fraction
        hidden[:, 0] |= ~hidden.any(1)  # at least one per sequence, so that the mean over them exists
        return inputs.masked_fill(hidden, vocab_size), inputs, hidden
