"""How sure the gate is of each token, which is not how evenly it uses the experts.

Shapes: L layers, T tokens, E experts.
"""

import math

import torch
from torch import Tensor

from moe_lab.observe.load import entropy
from moe_lab.observe.metric import declare

TOPIC = "Confidence: how sure the gate is"

declare(
    "token_entropy",
    TOPIC,
    "mean_t H(p_t) / ln E, p_t = the clean gate of token t at the current temperature",
    span=("0", "1"),
    balanced="any: 1 undecided, 0 decided",
    collapsed="any; near 0 in a collapse that feeds itself",
    reads="1: all experts alike for every token. 0: each token has its one expert. Skewed load and tiny entropy "
    "together, early, are the start of a collapse. Undefined for one expert.",
)


def gate_entropy(probs: Tensor) -> Tensor:
    """Nats of each gate, [..., E] -> [...]; 0 log 0 = 0. Four times as fast as entr on a CPU."""
    return -probs.clamp_min(torch.finfo(probs.dtype).tiny).log_().mul_(probs).sum(-1)


def token_entropy(entropy_sum_L: Tensor, tokens: int, E: int) -> Tensor:
    """Sum of gate entropies over tokens, nats [L] -> [L]; NaN for a single expert."""
    return entropy_sum_L.double() / tokens / math.log(E) if E > 1 else entropy_sum_L.double() * math.nan


declare(
    "mutual_information",
    TOPIC,
    "(H(mean_t p_t) - mean_t H(p_t)) / ln E",
    span=("0", "1"),
    balanced="1 where every gate is one-hot, 0 where every gate is uniform",
    collapsed="0",
    floor="0 exactly for a gate that ignores the token",
    floor_at=lambda T, E, k: 0.0,
    worst="min",
    source="Krause et al. 2010 (RIM), on the gate",
    reads="How much the token decides about the gate. Tells balanced because sorted (high) from balanced because "
    "undecided (0).",
)


def mutual_information(probs_sum_LE: Tensor, entropy_sum_L: Tensor, tokens: int) -> Tensor:
    """Sums over tokens of the gate [L, E] and of its entropy [L] -> [L]; NaN for a single expert."""
    E = probs_sum_LE.shape[-1]
    if E == 1:
        return entropy_sum_L.double() * math.nan
    return ((entropy(probs_sum_LE) - entropy_sum_L.double() / tokens) / math.log(E)).clamp_min(0)


declare(
    "logit_norm",
    TOPIC,
    "mean_t ||z_t||_2, z_t = the clean logits of token t",
    span=("0", "inf"),
    balanced="any",
    collapsed="any",
    worst="max",
    reads="Scale of the logits. Growth without bound saturates the gate and starves the router of gradient.",
)
declare(
    "logsumexp",
    TOPIC,
    "mean_t ln sum_e exp(z_te)",
    span=("-inf", "inf"),
    balanced="ln E for logits of 0",
    collapsed="any",
    source="its square is the z-loss of arXiv 2202.08906",
    reads="What the z-loss holds near 0.",
)
