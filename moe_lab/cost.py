"""What a run costs, counted analytically: parameters, and multiply-add FLOPs per token and update."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_lab.model.moe import MoE
from moe_lab.model.transformer import Transformer
from moe_lab.parts import Parts


def cost(parts: Parts) -> dict[str, Any]:
    """Parameters in all and used per token, forward FLOPs per token, and how many experts run per token.

    Of each MoE layer's experts, k are chosen, `active` shape a token's output (all of them in a dense mixture) and
    `executed` are run (all of them also in a straight-through router with backward=dense, for its gradient).
    `executed_over_chosen` of 8 means eight times the expert FLOPs of a choice. Training takes about three times the
    forward FLOPs.

    flops_per_token: what is executed. useful_flops_per_token: without padding, and without experts that run for the
    router's gradient alone. Where experts differ, in width or by having no network, a token meets their mean, which is
    right for even load. Where the data decides how many experts a token gets, k are reckoned with, and `..._at_most`
    says what it can come to; a summary's `experts_executed_measured` is what it came to in the last row.
    """
    return cost_of_model(parts.model, parts.settings.seq_len)


def cost_of_model(model: Transformer, S: int) -> dict[str, Any]:
    """The same of a model by itself, also of one on the meta device; S: tokens of a sequence."""
    layers = [expert_weights(moe, S) for moe in model.moes]
    held, active, executed, useful, most = (sum(layer) for layer in zip(*layers, strict=True)) if layers else [0] * 5
    of_experts = sum(p.numel() for moe in model.moes for p in moe.experts.parameters())
    others = sum(p.numel() for p in model.parameters()) - of_experts
    # Two FLOPs per active weight (the tied embedding counts once, as the output head) and the attention products.
    attention = sum(4 * S * model.embed.shape[1] for _ in model.blocks)
    found: dict[str, Any] = {"params": others + held, "active_params": round(others + active)}
    flops = {"flops_per_token": executed, "useful_flops_per_token": useful}
    if any(moe.router.ragged for moe in model.moes):
        flops["flops_per_token_at_most"] = most
    found |= {name: round(2 * (others + weights)) + attention for name, weights in flops.items()}
    return found | (counts(model.moes[0], S) if layers else {})


def expert_weights(moe: MoE, seq_len: int) -> tuple[int, float, float, float, float]:
    """Weights of a layer's experts: held, and per token active, executed, useful, and executed at most."""
    router, (own, padded) = moe.router, moe.experts.products()
    rows, each, each_padded = router.rows_per_token(seq_len), sum(own) / len(own), sum(padded) / len(padded)
    useful, most = min(router.active, rows), router.most_per_token() if router.ragged else rows
    return sum(own), router.active * each, rows * each_padded, useful * each, most * each_padded


def counts(moe: MoE, seq_len: int) -> dict[str, Any]:
    """How many experts there are, and how many of them a token is concerned with."""
    router, rows = moe.router, moe.router.rows_per_token(seq_len)
    found = {"experts": moe.experts.num, "expert_widths": sorted(set(moe.experts.widths))}
    found |= {"experts_chosen": router.k, "experts_active": router.active, "experts_executed": rows}
    found |= {"experts_executed_at_most": router.most_per_token()} if router.ragged else {}
    return found | {"executed_over_chosen": rows / router.k}


def measured(moes: Sequence[MoE], row: Mapping[str, Any]) -> dict[str, float]:
    """Experts that ran per token in the last row, mean over layers, where the data decides how many."""
    mean = row.get("moe/experts_per_token/mean")
    if mean is None or not any(moe.router.ragged for moe in moes):
        return {}
    selected, kept = (sum(map(sum, row[f"moe/{name}"])) for name in ("selected", "kept"))
    return {"experts_executed_measured": mean * kept / max(selected, 1)}
