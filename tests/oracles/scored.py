"""The score-based routers in float64, token by token and expert by expert, from the papers' formulas.

Nothing of moe_lab is imported. Weights are returned as lists of tensors, so that autograd gives their gradients;
SparseMixer's, whose backward is not that of its forward, are written by hand. Sources: see each function.
"""

import math

import torch
from torch import Tensor


def norm(v: Tensor) -> Tensor:
    return sum((a * a for a in v), torch.zeros((), dtype=v.dtype)).sqrt()


def linear_score(x: Tensor, row: Tensor) -> Tensor:
    return sum((a * b for a, b in zip(x, row, strict=True)), torch.zeros((), dtype=x.dtype))


def mlp_hidden(x: Tensor, hidden: Tensor) -> Tensor:
    """silu(hidden x), one neuron at a time."""
    before = [linear_score(x, row) for row in hidden]
    return torch.stack([h / (1 + torch.exp(-h)) for h in before])


def cosine_score(x: Tensor, project: Tensor, embedding: Tensor, tau: Tensor) -> Tensor:
    """X-MoE (arXiv 2204.09179): cos(W h, e_i) / tau."""
    h = torch.stack([linear_score(x, row) for row in project])
    return linear_score(h, embedding) / (norm(h) * norm(embedding) * tau)


def lpr_latent(x: Tensor, gain: Tensor, bias: Tensor, encoder: Tensor, shift: Tensor) -> Tensor:
    """Latent Prototype Routing (arXiv 2506.21328): W silu(LayerNorm(h)) + b."""
    zero = torch.zeros((), dtype=x.dtype)
    mean = sum(x, zero) / len(x)
    variance = sum(((a - mean) ** 2 for a in x), zero) / len(x)
    normed = torch.stack([(a - mean) / (variance + 1e-5).sqrt() * g + b for a, g, b in zip(x, gain, bias, strict=True)])
    active = torch.stack([a / (1 + torch.exp(-a)) for a in normed])
    return torch.stack([linear_score(active, row) + s for row, s in zip(encoder, shift, strict=True)])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return linear_score(a, b) / (norm(a) * norm(b))


def lpr_diversity(prototypes: Tensor) -> Tensor:
    """Mean squared entry of P P^T - I for unit prototypes."""
    E = len(prototypes)
    total = torch.zeros((), dtype=prototypes.dtype)
    for i in range(E):
        for j in range(E):
            total = total + (cosine(prototypes[i], prototypes[j]) - float(i == j)) ** 2
    return total / E**2


def lpr_alignment(latents: list[Tensor], chosen: list[list[int]], prototypes: Tensor) -> Tensor:
    """Mean of 1 - cos over the tokens and the prototypes that they chose; moves the prototypes alone."""
    terms = [1 - cosine(z.detach(), prototypes[e]) for z, es in zip(latents, chosen, strict=True) for e in es]
    return sum(terms, torch.zeros((), dtype=prototypes.dtype)) / len(terms)


def gates(scores: list[Tensor], gate: str) -> list[Tensor]:
    """softmax, sigmoid, or sigmoids over their sum, of the scores that are given and no others."""
    if gate == "softmax":
        top = max(float(s.detach()) for s in scores)
        parts = [torch.exp(s - top) for s in scores]
    else:
        parts = [1 / (1 + torch.exp(-s)) for s in scores]
    total = sum(parts, torch.zeros((), dtype=scores[0].dtype))
    return parts if gate == "sigmoid" else [p / total for p in parts]


def ranked(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -values[e])


def gated(
    scores: list[Tensor],
    k: int,
    gate: str,
    order: str,
    renormalise: bool,
    temperature: float = 1.0,
    bias: list[float] | None = None,
) -> dict[int, Tensor]:
    """One token: the k largest (gate + bias where there is one), weighted by the gate over all or over the chosen."""
    merits = [
        float(s.detach() if bias is None else g.detach()) for s, g in zip(scores, gates(scores, gate), strict=True)
    ]
    best = ranked([m + (0.0 if bias is None else bias[e]) for e, m in enumerate(merits)])[:k]
    return weigh([s / temperature for s in scores], best, gate, order, renormalise)


def weigh(scores: list[Tensor], chosen: list[int], gate: str, order: str, renormalise: bool) -> dict[int, Tensor]:
    """The weights of one token's experts, however they were chosen: the gate over all or over these."""
    if not chosen:
        return {}
    if order == "topk_first":
        weights = dict(zip(chosen, gates([scores[e] for e in chosen], gate), strict=True))
    else:
        every = gates(scores, gate)
        weights = {e: every[e] for e in chosen}
    return shared(weights) if renormalise else weights


def stand_ins(scores: list[Tensor], chosen: list[int], gate: str, order: str, renormalise: bool) -> dict[int, Tensor]:
    """Default MoE's weights of the means of the experts that do not run: the gate over all experts, and its share where
    the weights of those that run sum to one."""
    every = dict(enumerate(gates(scores, gate)))
    if renormalise or (order == "topk_first" and gate != "sigmoid"):
        every = shared(every)
    return {e: g for e, g in every.items() if e not in chosen}


def wanted(scores: list[list[Tensor]], take: int, gate: str, order: str) -> list[list[int]]:
    """The experts of each token under expert choice: every expert takes the `take` tokens of one group whose gate
    value (topk_first: score) for it is largest."""
    wishes = [row if order == "topk_first" else gates(row, gate) for row in scores]
    chosen: list[list[int]] = [[] for _ in scores]
    for e in range(len(scores[0])):
        for t in ranked([float(row[e].detach()) for row in wishes])[:take]:
            chosen[t].append(e)
    return chosen


def shared(weights: dict[int, Tensor]) -> dict[int, Tensor]:
    total = sum(weights.values(), torch.zeros((), dtype=torch.float64))
    return {e: w / total for e, w in weights.items()}


def top_p(
    scores: list[Tensor],
    mass: float,
    most: int,
    gate: str = "softmax",
    renormalise: bool = False,
    temperature: float = 1.0,
    bias: list[float] | None = None,
) -> dict[int, Tensor]:
    """One token: experts in order of rank until the probability of those taken reaches `mass`, at most `most`.

    The mass is that of the probabilities at temperature 1, whatever ranks.
    """
    probs = [float(g.detach()) for g in gates(scores, gate)]
    whole = sum(probs)
    probs = [p / whole for p in probs]
    merits = [
        float(s.detach() if bias is None else g.detach()) for s, g in zip(scores, gates(scores, gate), strict=True)
    ]
    taken: list[int] = []
    reached = 0.0
    for e in ranked([m + (0.0 if bias is None else bias[e]) for e, m in enumerate(merits)]):
        taken.append(e)
        reached += probs[e]
        if reached >= mass or len(taken) == most:
            break
    every = gates([s / temperature for s in scores], gate)
    weights = {e: every[e] for e in taken}
    return shared(weights) if renormalise else weights


def hashed(token: int, experts: int, k: int) -> list[int]:
    """Hash layers (arXiv 2106.04426) by remainder; further choices are the next experts."""
    return [(token + j) % experts for j in range(k)]


def uniformly(draws: list[float], k: int) -> list[int]:
    return ranked(draws)[:k]


SCALE = {"v1": (0.5, 0.5, 2.0), "v2": (0.75, 1 / 3, 1.0)}  # below which draw, by how much smaller, gradient's factor


def sparsemixer(
    scores: list[float],
    gumbel: list[list[float]] | None,
    uniform: list[float] | None,
    k: int,
    version: str,
    r: float,
    grads: list[float],
    temperature: float = 1.0,
) -> tuple[list[int], list[float], list[float]]:
    """One token: experts, weights, and the gradient by the scores for the gradients by the weights (in order).

    SparseMixer (arXiv 2310.00811) and SparseMixer-v2 (arXiv 2409.12136): each expert is drawn from the softmax of the
    scores that are near the largest, without those drawn before. An expert that is not the best one is weighted by
    half (v1, with chance 1/2) or a third (v2, with chance 3/4) of its probability; the gradient is that of the whole
    probability (twice, in v1). Without draws the best is taken, at its probability, and nothing is rescaled.
    """
    E = len(scores)
    below, smaller, factor = SCALE[version]
    chosen: list[int] = []
    weights: list[float] = []
    gradient = [0.0] * E
    for i in range(k):
        left = [e for e in range(E) if e not in chosen]
        top = max(scores[e] for e in left)
        near = [e for e in left if top - scores[e] <= 2 * r * max(abs(scores[e]), top)]
        total = sum(math.exp((scores[e] - top) / temperature) for e in near)
        p = {e: math.exp((scores[e] - top) / temperature) / total for e in near}
        best = max(near, key=lambda e: scores[e])
        pick, scale, times = best, 1.0, 1.0
        if gumbel is not None and uniform is not None:
            pick = max(near, key=lambda e: scores[e] / temperature + gumbel[i][e])
            scale = smaller if pick != best and uniform[i] <= below else 1.0
            times = factor
        chosen.append(pick)
        weights.append(scale * p[pick])
        for e in near:
            gradient[e] += times * grads[i] * p[pick] * ((e == pick) - p[e]) / temperature
    return chosen, weights, gradient
