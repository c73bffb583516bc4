"""Does the task reach the routers? The gradient of the task loss alone, without balance terms, per MoE layer."""

import torch

from moe_lab.model.moe import MoE


def gradient_ratio(moes: list[MoE], task_loss: torch.Tensor) -> list[float | None]:
    """|d task / d router| over |d task / d experts| per layer; None where a router has no parameters that are trained.

    Renormalised top-1 gates give about 1e-5 rather than 0 in floating point; below 1e-4 the router is frozen.
    """
    trained = [[p for p in moe.router.parameters() if p.requires_grad] for moe in moes]
    groups = trained + [[*moe.experts.parameters()] for moe in moes]
    flat = [p for group in groups for p in group]
    gradients = iter(torch.autograd.grad(task_loss, flat, allow_unused=True))
    squares = []
    for group in groups:
        found = [g for _ in group if (g := next(gradients)) is not None]
        squares.append(sum((g.double().square().sum() for g in found), torch.zeros((), dtype=torch.float64)).cpu())
    norms = torch.stack(squares).sqrt().tolist()
    routers, experts = norms[: len(moes)], norms[len(moes) :]
    return [r / e if group and e > 0 else None for r, e, group in zip(routers, experts, groups, strict=False)]
