"""Routers that look across tokens, from their papers' formulas: float64, plain loops over tokens and experts.

Nothing here knows moe_lab. An expert is a function of one row [D]; gradients are autograd's.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]


def unit(v_D: Tensor, eps: float = 1e-6) -> Tensor:
    """Algorithm 2 of arXiv 2308.00951: v / (|v| + eps)."""
    return v_D / (torch.sqrt(sum((c * c for c in v_D), torch.zeros(()))) + eps)


def softmax(values: Sequence[Tensor]) -> list[Tensor]:
    top = max(float(v.detach()) for v in values)
    powers = [torch.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def soft_moe(
    x_SD: Tensor, phi: Sequence[Tensor], scale: Tensor, experts: Sequence[Expert], causal: str = "none", block: int = 1
) -> Tensor:
    """One sequence. phi: a vector [D] per slot, those of expert 0 first. y_t = sum_s C_ts f_s(sum_i D_is x_i).

    D is the softmax over the tokens that token t may use: all of them, those up to t (prefix), or those of the block
    before t's own (blocks), where the first block has the first token alone and no gradient to it.
    """
    S, per_expert = len(x_SD), len(phi) // len(experts)
    logit = [[scale * (unit(x) * unit(p)).sum() for p in phi] for x in x_SD]
    rows = []
    for t in range(S):
        x, first = x_SD, t // block * block
        if causal == "none":
            usable = range(S)
        elif causal == "prefix":
            usable = range(t + 1)
        else:
            usable = range(first - block, first) if first else range(1)
            x = x_SD if first else x_SD.detach()
        combine = softmax(logit[t])
        y_D = torch.zeros_like(x_SD[0])
        for s in range(len(phi)):
            dispatch = softmax([logit[i][s] for i in usable])
            slot_D = sum((d * x[i] for d, i in zip(dispatch, usable, strict=True)), torch.zeros_like(x_SD[0]))
            y_D = y_D + combine[s] * experts[s // per_expert](slot_D)
        rows.append(y_D)
    return torch.stack(rows)


def expert_choice(x_TD: Tensor, w_ED: Tensor, experts: Sequence[Expert], capacity: float) -> Tensor:
    """One group of tokens. Each expert takes its ceil(n c / E) most probable ones (arXiv 2202.09368)."""
    n, E = len(x_TD), len(experts)
    take = min(n, max(1, math.ceil(capacity * n / E - 1e-9)))
    p = [softmax([(w * x).sum() for w in w_ED]) for x in x_TD]
    rows = [torch.zeros_like(x_TD[0]) for _ in range(n)]
    for e in range(E):
        for t in sorted(range(n), key=lambda t: -float(p[t][e].detach()))[:take]:
            rows[t] = rows[t] + p[t][e] * experts[e](x_TD[t])
    return torch.stack(rows)


def sinkhorn(logits_TE: Tensor, iterations: int) -> list[list[float]]:
    """exp(logits) with rows scaled to sum to 1/T and then columns to 1/E, again and again; columns come last."""
    T, E = logits_TE.shape
    m = [[math.exp(float(z)) for z in row] for row in logits_TE]
    for _ in range(iterations):
        for t in range(T):
            total = sum(m[t])
            m[t] = [v / total / T for v in m[t]]
        for e in range(E):
            total = sum(m[t][e] for t in range(T))
            for t in range(T):
                m[t][e] /= total * E
    return m


def best_balanced(score_TE: Tensor) -> float:
    """The largest total score of an assignment with at most ceil(T / E) tokens per expert: tries every one."""
    T, E = score_TE.shape
    room, best = math.ceil(T / E), -math.inf
    for chosen in itertools.product(range(E), repeat=T):
        if all(chosen.count(e) <= room for e in range(E)):
            best = max(best, sum(float(score_TE[t, e]) for t, e in enumerate(chosen)))
    return best


def smooth_step(z: Tensor, width: float) -> Tensor:
    """arXiv 2002.07772: 0 left of -width/2, 1 right of width/2, a cubic in between."""
    if z.item() <= -width / 2:
        return z * 0
    if z.item() >= width / 2:
        return z * 0 + 1
    return -2 * z**3 / width**3 + 3 * z / (2 * width) + 0.5


def selector(z: Sequence[Tensor], num_experts: int, width: float) -> list[Tensor]:
    """r(z)_i = prod_j S(z_j)^b_j(i) (1 - S(z_j))^(1 - b_j(i)); b(i) is i in binary, the highest digit first."""
    found = []
    for i in range(num_experts):
        product = torch.ones((), dtype=torch.float64)
        for j, z_j in enumerate(z):
            digit = i >> (len(z) - 1 - j) & 1
            s = smooth_step(z_j, width)
            product = product * (s if digit else 1 - s)
        found.append(product)
    return found


def dselect_k(z: Sequence[Sequence[Tensor]], a: Sequence[Tensor], num_experts: int, width: float) -> list[Tensor]:
    """One token's weights q = sum_s softmax(a)_s r(z_s) (arXiv 2106.03760), [E]."""
    share = softmax(a)
    chosen = [selector(z_s, num_experts, width) for z_s in z]
    return [
        sum((w * r[i] for w, r in zip(share, chosen, strict=True)), torch.zeros((), dtype=torch.float64))
        for i in range(num_experts)
    ]


def selector_entropy(z: Sequence[Sequence[Tensor]], num_experts: int, width: float, eps: float = 1e-6) -> Tensor:
    """One token's regulariser: the entropies of its selectors, summed; 0 where every selector is one-hot."""
    total = torch.zeros((), dtype=torch.float64)
    for z_s in z:
        for r in selector(z_s, num_experts, width):
            total = total - r * torch.log(r + eps)
    return total


def unreachable(z: Sequence[Sequence[Tensor]], num_experts: int, width: float) -> Tensor:
    """One token's penalty on codes of no expert: sum_s 1 / sum_i r(z_s)_i - 1; 0 where E is a power of two."""
    sums = [sum(selector(z_s, num_experts, width), torch.zeros((), dtype=torch.float64)) for z_s in z]
    return sum((1 / s - 1 for s in sums), torch.zeros((), dtype=torch.float64))
