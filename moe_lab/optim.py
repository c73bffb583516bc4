"""The optimiser and its learning rate, a function of the step."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.adamw import adamw

from moe_lab.config import option

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Optimizer:
    """The moments of AdamW by parameter, and its fused update.

    What torch.optim.AdamW(fused=True) computes, by the function that it calls. The class is not used since building
    any of torch.optim's imports torch's compiler, which takes as long as importing torch.
    """

    def __init__(self, model: torch.nn.Module, betas: tuple[float, float], weight_decay: float):
        self.betas = betas
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.updates = [torch.zeros((), device=p.device) for p in self.parameters]
        self.names = list(named)
        self.groups = [
            (weight_decay, [i for i, p in enumerate(self.parameters) if p.ndim >= 2]),
            (0.0, [i for i, p in enumerate(self.parameters) if p.ndim < 2]),
        ]

    @torch.no_grad()
    def step(self, lr: float, found_inf: Tensor) -> None:
        """Update every parameter that has a gradient, unless `found_inf` (0-dim, on the device) is 1."""
        for weight_decay, members in self.groups:
            grads = {i: grad for i in members if (grad := self.parameters[i].grad) is not None}
            adamw(
                [self.parameters[i] for i in grads],
                [*grads.values()],
                [self.moments[i][0] for i in grads],
                [self.moments[i][1] for i in grads],
                [],
                [self.updates[i] for i in grads],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=weight_decay,
                eps=1e-8,
                maximize=False,
            )

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Per parameter, by name: the mean of its gradients, that of their squares, and the updates so far."""
        held = {}
        for name, (mean, square), updates in zip(self.names, self.moments, self.updates, strict=True):
            held |= {f"{name}.exp_avg": mean, f"{name}.exp_avg_sq": square, f"{name}.step": updates}
        return held

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for name, t in self.state().items():
            t.copy_(state[name])


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

    def build(self, model: torch.nn.Module) -> Optimizer:
        return Optimizer(model, self.betas, self.weight_decay)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of the update after `step` updates of `steps`."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        fallen = (1 - math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
        return self.lr * (1 - (1 - self.final_lr) * fallen)
