"""Exploration and capacity in plain loops, float64, one token and one expert at a time; nothing of moe_lab is imported.

Shapes: T tokens, D width, E experts, K chosen. Draws u are uniform in [0, 1), v standard.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def jittered(x_D: Tensor, u_D: Tensor, eps: float) -> Tensor:
    """Each entry times Uniform(1 - eps, 1 + eps) (Switch, arXiv 2101.03961, "input jitter")."""
    return torch.stack([x * (1 - eps + 2 * eps * float(u)) for x, u in zip(x_D, u_D, strict=True)])


def dropped_out(x_D: Tensor, u_D: Tensor, p: float) -> Tensor:
    """Each entry 0 with probability p, else over 1 - p (dropout; Switch, "input dropout")."""
    return torch.stack([x * 0 if float(u) < p else x / (1 - p) for x, u in zip(x_D, u_D, strict=True)])


def scores(x_D: Tensor, w_ED: Tensor) -> Tensor:
    return torch.stack([(x_D * w_D).sum() for w_D in w_ED])


def can_be_chosen(u_E: Tensor, q: float, k: int) -> list[bool]:
    """An expert is out where its draw is below q; the k with the largest draws stay whatever they are."""
    largest = sorted(range(len(u_E)), key=lambda e: -float(u_E[e]))[:k]
    return [float(u_E[e]) >= q or e in largest for e in range(len(u_E))]


def top(rank_E: Sequence[float], k: int, allowed: Sequence[bool] | None = None) -> list[int]:
    """The k best of the allowed experts, best first."""
    left = [e for e in range(len(rank_E)) if allowed is None or allowed[e]]
    found = []
    for _ in range(k):
        best = max(left, key=lambda e: rank_E[e])
        found.append(best)
        left.remove(best)
    return found


def softmax(z_E: Tensor, allowed: Sequence[bool] | None = None) -> Tensor:
    """Over the allowed experts alone; the others get 0."""
    exps = [torch.exp(z) if allowed is None or allowed[e] else z * 0 for e, z in enumerate(z_E)]
    return torch.stack([e / sum(exps) for e in exps])


def keeps_second(g1: float, g2: float, u: float, threshold: float, of: str) -> bool:
    """With probability min(1, g2 / threshold). GShard (arXiv 2006.16668, algorithm 1): 2 g2 > u, a threshold of 1/2;
    Mesh-TensorFlow's policy "threshold": 0.2. g2 is the second weight's share of both, or its probability as it is."""
    value = g2 / (g1 + g2) if of == "share" else g2
    return threshold == 0 or u < value / threshold


def weights(
    x_TD: Tensor,
    w_ED: Tensor,
    k: int,
    renormalise: bool,
    heard: Callable[[int, Tensor], Tensor] = lambda t, x_D: x_D,
    noise: Callable[[int, Tensor], Tensor] = lambda t, z_E: z_E,
    allowed: Callable[[int], Sequence[bool] | None] = lambda t: None,
    rank: Callable[[int, list[float]], list[float]] = lambda t, rank_E: rank_E,
    second: Callable[[int, float, float], bool] = lambda t, g1, g2: True,
) -> Tensor:
    """Combine weights [T, E] of softmax top-k routing: what the router hears, noise on its logits, which experts can
    be chosen, a last word on the ranking, and whether the second of two stays. A weight that goes is not made up for.
    """
    rows = []
    for t, x_D in enumerate(x_TD):
        z_E = noise(t, scores(heard(t, x_D), w_ED))
        may = allowed(t)
        p_E = softmax(z_E, may)
        chosen = top(rank(t, z_E.tolist()), k, may)
        total = sum(p_E[e] for e in chosen) if renormalise else 1.0
        g_K = p_E.detach()[chosen].tolist()
        used = chosen[:1] if k == 2 and not second(t, *g_K) else chosen
        zero = p_E[0] * 0
        rows.append(torch.stack([p_E[e] / total if e in used else zero for e in range(len(w_ED))]))
    return torch.stack(rows)


def within_capacity(
    expert_TK: list[list[int]], weight_TK: list[list[float]], rows: int, by: str, none: int | None = None
) -> list[list[bool]]:
    """Which choices fit where an expert takes `rows` of them: the first in token order, or those of the largest
    weight, and of equals the first. A slot that names the expert `none` holds no choice."""
    kept = [[False] * len(row) for row in expert_TK]
    experts = {e for row in expert_TK for e in row if e != none}
    for expert in experts:
        asking = [(t, j) for t, row in enumerate(expert_TK) for j, e in enumerate(row) if e == expert]
        if by == "probability":
            asking.sort(key=lambda at: -weight_TK[at[0]][at[1]])
        for t, j in asking[:rows]:
            kept[t][j] = True
    return kept
