"""What a run costs, counted analytically: parameters, and multiply-add FLOPs per token and update."""

from typing import Any

from moe_lab.loop import Parts


def cost(parts: Parts) -> dict[str, Any]:
    """Parameters in all and used per token, forward FLOPs per token, and how many experts run per token.

    `experts_executed` over `experts_useful` is what a router costs that runs every expert (dense mixtures, and
    straight-through with backward=dense): `executed_over_useful` of 8 means eight times the expert FLOPs of a choice.
    Training takes about three times the forward FLOPs.
    """
    model, S = parts.model, parts.settings.seq_len
    total = sum(p.numel() for p in model.parameters())
    idle = extra = 0
    useful = executed = 0
    for moe in model.moes:
        per_expert = sum(p.numel() for p in moe.experts.parameters()) // moe.experts.num
        useful = moe.router.k
        executed = moe.experts.num if moe.router.every_expert else useful
        idle += per_expert * (moe.experts.num - useful)
        extra += per_expert * (executed - useful)
    active = total - idle
    # Two FLOPs per active weight (the tied embedding counts once, as the output head) and the attention products.
    attention = sum(4 * S * model.embed.shape[1] for _ in model.blocks)
    found = {"params": total, "active_params": active, "flops_per_token": 2 * (active + extra) + attention}
    if model.moes:
        found |= {"experts_useful": useful, "experts_executed": executed, "executed_over_useful": executed / useful}
    return found
