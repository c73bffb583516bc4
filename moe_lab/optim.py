"""The optimiser and its learning-rate schedule."""

from typing import Annotated

import torch
from pydantic import Field
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from moe_lab.config import option

Fraction = Annotated[float, Field(ge=0, lt=1)]


@option("optim", "adamw")
class AdamW:
    """AdamW with linear warm-up and cosine decay. Weight decay falls on matrices only."""

    def __init__(
        self,
        *,
        lr: Annotated[float, Field(gt=0)] = 3e-3,
        warmup: Fraction = 0.05,
        final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1,
        beta1: Fraction = 0.9,
        beta2: Fraction = 0.95,
        weight_decay: Annotated[float, Field(ge=0)] = 0.1,
        clip: Annotated[float, Field(gt=0)] | None = 1.0,
        accumulate: Annotated[int, Field(ge=1)] = 1,
    ):
        self.lr, self.warmup, self.final_lr = lr, warmup, final_lr
        self.betas, self.weight_decay = (beta1, beta2), weight_decay
        self.clip, self.accumulate = clip, accumulate

    def build(self, model: torch.nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        warm = max(1, round(self.warmup * steps))
        rise = LinearLR(optimizer, start_factor=1 / (warm + 1), total_iters=warm)
        fall = CosineAnnealingLR(optimizer, T_max=max(1, steps - warm), eta_min=self.lr * self.final_lr)
        return optimizer, SequentialLR(optimizer, [rise, fall], milestones=[warm])
