"""What a run costs, counted analytically: parameters, and multiply-add FLOPs per token and update."""

from typing import Any

from moe_lab.loop import Parts
from moe_lab.model.moe import MoE


def cost(parts: Parts) -> dict[str, Any]:
    """Parameters in all and used per token, forward FLOPs per token, and how many experts run per token.

    Of each MoE layer's experts, k are chosen, `active` shape a token's output (all of them in a dense mixture) and
    `executed` are run (all of them also in a straight-through router with backward=dense, for its gradient).
    `executed_over_chosen` of 8 means eight times the expert FLOPs of a choice. Training takes about three times the
    forward FLOPs.
    """
    model, S = parts.model, parts.settings.seq_len
    total = sum(p.numel() for p in model.parameters())
    idle = extra = 0
    for moe in model.moes:
        per_expert = sum(p.numel() for p in moe.experts.parameters()) // moe.experts.num
        idle += per_expert * (moe.experts.num - moe.router.active)
        extra += per_expert * (executed(moe, S) - moe.router.active)
    active = total - idle
    # Two FLOPs per active weight (the tied embedding counts once, as the output head) and the attention products.
    attention = sum(4 * S * model.embed.shape[1] for _ in model.blocks)
    found: dict[str, Any] = {"params": total, "active_params": active}
    found["flops_per_token"] = round(2 * (active + extra)) + attention
    for moe in model.moes[:1]:
        counts = {"chosen": moe.router.k, "active": moe.router.active, "executed": executed(moe, S)}
        found |= {f"experts_{name}": n for name, n in counts.items()}
        found["executed_over_chosen"] = executed(moe, S) / moe.router.k
    return found


def executed(moe: MoE, seq_len: int) -> float:
    """Expert rows that run per token."""
    return moe.router.rows_per_token(seq_len)
