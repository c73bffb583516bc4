"""How the routing moves: between windows, between updates, between evaluations.

Shapes: L layers, T tokens, E experts, K chosen per token.
"""

import math

from torch import Tensor

from moe_lab.observe.metric import declare

TOPIC = "Dynamics: how the routing moves"


def shift_floor(T: int, E: int, k: int) -> float:
    """Mean total variation between the loads of two windows of T tokens under random choice."""
    return math.sqrt((E / k - 1) / (math.pi * T))


def total_variation(a_LE: Tensor, b_LE: Tensor) -> Tensor:
    """Half the summed difference of the two normalised loads, [L, E], [L, E] -> [L]."""
    a_LE, b_LE = a_LE.double(), b_LE.double()
    return (a_LE / a_LE.sum(-1, keepdim=True) - b_LE / b_LE.sum(-1, keepdim=True)).abs().sum(-1) / 2


declare(
    "load_shift",
    TOPIC,
    "sum_e |q_e - q'_e| / 2, q and q' the loads of this window and of the one before",
    when="training",
    span=("0", "1"),
    balanced="0",
    collapsed="0, once it stays with the same experts",
    floor="sqrt((E/k - 1) / (pi T)), T = tokens in each of the two windows; load_flutter_floor / sqrt(window) if "
    "choices depend on the sequence",
    floor_at=shift_floor,
    worst="max",
    source="total variation distance",
    reads="The share of the load that changed hands since the last row.",
)
declare(
    "load_flutter",
    TOPIC,
    "mean over the window's updates of sum_e |q_e - q'_e| / 2, q' = the load of the update before",
    when="training",
    span=("0", "1"),
    balanced="0",
    collapsed="0, once it stays with the same experts",
    floor="sqrt((E/k - 1) / (pi T)), T = tokens of an update",
    floor_at=shift_floor,
    worst="max",
    reads="The share of the load that changes hands from update to update; read it against load_flutter_floor.",
)
declare(
    "load_flutter_floor",
    TOPIC,
    "sqrt(2 I / (pi B)); I = information between choice and sequence inside an update of B sequences, nats",
    when="training",
    span=("0", "inf"),
    balanced="sqrt((E/k - 1) / (pi T)) if choices do not depend on the sequence",
    collapsed="0",
    floor="see balanced",
    floor_at=shift_floor,
    reads="What load_flutter would be if only the sequences changed from update to update. Beyond it the router moved.",
)


def flutter_floor(within_L: Tensor, sequences: float) -> Tensor:
    """Plug-in information between choice and sequence inside an update, nats [L], and sequences per update -> [L].

    2 I is the mean chi-square distance of a sequence's load from the update's; the mean of B such loads varies B
    times less, and the mean difference of two normals of variance v is 2 sqrt(v / pi). NaN for one sequence.
    """
    unbiased_L = within_L * sequences / (sequences - 1) if sequences > 1 else within_L * math.nan
    return (2 * unbiased_L.clamp_min(0) / (math.pi * sequences)).sqrt()


declare(
    "churn",
    TOPIC,
    "1 - mean_t |S_t & S'_t| / k on a fixed probe batch, S and S' the choices now and at the evaluation before",
    span=("0", "1"),
    balanced="1 - k/E for a fresh random draw",
    collapsed="0",
    floor="0 exactly: same tokens, no noise",
    floor_at=lambda T, E, k: 0.0,
    worst="max",
    source="routing fluctuation, arXiv 2204.08396 and 2204.09179",
    reads="Share of the choices that changed. It should fall late in training; 0 from the start: nothing learns.",
    when="evaluation",
)


def churn(before_LTK: Tensor, now_LTK: Tensor, E: int) -> Tensor:
    """Choices of the same tokens [L, T, K] at two times -> [L]; E stands for no choice."""
    same_LTK = (before_LTK[:, :, :, None] == now_LTK[:, :, None, :]).any(-1) & (before_LTK < E)
    return 1 - same_LTK.sum((-2, -1)).double() / (before_LTK < E).sum((-2, -1))


declare(
    "router_grad_ratio",
    TOPIC,
    "||d task / d router|| / ||d task / d experts|| on one fixed batch, balance terms left out",
    span=("0", "inf"),
    balanced="of the order of 0.01 to 10",
    collapsed="falls as the gate saturates",
    floor="1e-5 where the exact value is 0 (renormalised top-1 in fp32)",
    floor_at=lambda T, E, k: 1e-5,
    worst="min",
    source="our measurement",
    reads="Below 1e-4 the task does not train the router: frozen.",
    when="liveness",
)

# What balancers move by themselves, and tell in `Balancer.held`.
declare(
    "bias_range",
    TOPIC,
    "max_e(b_e) - min_e(b_e), b the selection bias after the row's last update",
    when="balancer",
    span=("0", "inf"),
    balanced="as much as the router needs; it stands still",
    collapsed="still grows: that of loss_free by up to 2 rate an update",
    worst="max",
    reads="With balance=[loss_free] or [quantile]. It is added to gate values: far above their spread it decides.",
    source="arXiv 2408.15664",
)
declare(
    "l1_lambda",
    TOPIC,
    "lambda of l1_adaptive after the row's last update, the same in all layers",
    when="balancer",
    span=("1e-30", "1e30"),
    balanced="wanders about the value at which k gates per token are open",
    collapsed="the same: it answers to how many gates are open, not to whose",
    source="arXiv 2412.14711",
    reads="With balance=[l1_adaptive]. Still growing: more than k gates per token are open.",
)
