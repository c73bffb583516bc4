"""How evenly the experts are used.

Shapes: L layers, E experts. counts_LE are choices summed over the whole window; a ratio is taken once, from sums,
because the mean of per-batch ratios is another number (CV 2.65 where the window's is 1.73).
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from moe_lab.observe.metric import declare

TOPIC = "Load: how evenly the experts are used"
DEAD = 0.01  # an expert below this share of the mean load is dead
DEAD_WINDOW = 100  # updates; shorter windows call experts dead that are only rare


def cv_floor(T: int, E: int, k: int) -> float:
    """Root mean square CV of the counts when every token picks k of E experts at random."""
    return math.sqrt((E / k - 1) / T)


def max_vio_floor(T: int, E: int, k: int) -> float:
    """The counts are nearly normal and sum to a constant; Blom's approximation of the largest of E normals."""
    largest = NormalDist().inv_cdf((E - 0.375) / (E + 0.25))
    return cv_floor(T, E, k) * math.sqrt(E / (E - 1)) * largest


def min_max_floor(T: int, E: int, k: int) -> float:
    vio = max_vio_floor(T, E, k)
    return max(0.0, 1 - vio) / (1 + vio)


def gini_floor(T: int, E: int, k: int) -> float:
    return cv_floor(T, E, k) * math.sqrt((E - 1) / (math.pi * E))


def entropy_floor(T: int, E: int, k: int) -> float:
    """Near balance, ln E minus the entropy is CV^2 / 2."""
    return 1 - cv_floor(T, E, k) ** 2 / (2 * math.log(E))


def effective_floor(T: int, E: int, k: int) -> float:
    return E * math.exp(-(cv_floor(T, E, k) ** 2) / 2)


def cv_ceiling(E: int, k: int) -> float:
    """CV when the same k of E experts get every token."""
    return math.sqrt(E / k - 1)


declare(
    "load_cv",
    TOPIC,
    "std_e(c_e) / mean_e(c_e), population std; c_e = tokens that chose expert e",
    span=("0", "sqrt(E/k - 1)"),
    balanced="0",
    collapsed="sqrt(E/k - 1)",
    floor="sqrt((E/k - 1) / T)",
    floor_at=cv_floor,
    worst="max",
    source="arXiv 1701.06538",
    reads="Spread of the load. Compare it with its ceiling and its floor, both of which depend on E, k and T.",
)


def cv(counts_LE: Tensor) -> Tensor:
    """[L, E] -> [L]"""
    counts_LE = counts_LE.double()
    return counts_LE.std(-1, unbiased=False) / counts_LE.mean(-1)


declare(
    "load_cv_of_ceiling",
    TOPIC,
    "load_cv / sqrt(E/k - 1)",
    span=("0", "1"),
    balanced="0",
    collapsed="1",
    floor="1 / sqrt(T)",
    floor_at=lambda T, E, k: T**-0.5,
    worst="max",
    reads="Share of the possible imbalance, comparable between numbers of experts. From 1/3 on: collapsed. "
    "Undefined for k = E.",
)


def cv_of_ceiling(counts_LE: Tensor, k: int) -> Tensor:
    """[L, E] -> [L]; NaN where k = E leaves nothing to choose."""
    return cv(counts_LE) / cv_ceiling(counts_LE.shape[-1], k) if k < counts_LE.shape[-1] else cv(counts_LE) * math.nan


declare(
    "importance_cv",
    TOPIC,
    "CV over experts of sum_t p_te; p = the clean gate probabilities",
    span=("0", "sqrt(E - 1)"),
    balanced="0",
    collapsed="sqrt(E - 1) where the gate is one-hot, less where it is soft",
    floor="std_t(p_te) / (mean p sqrt(T)): none where the gate is the same for all tokens",
    worst="max",
    source="the P of arXiv 2101.03961",
    reads="Spread of the probabilities. Below load_cv: the choice is more skewed than the probabilities behind it.",
)
declare(
    "gate_mass_cv",
    TOPIC,
    "CV over experts of sum_t w_te; w = the combine weights of the chosen experts, before capacity",
    span=("0", "sqrt(E - 1)"),
    balanced="0",
    collapsed="sqrt(E/k - 1) where k experts share all weight evenly, up to sqrt(E - 1)",
    floor="that of load_cv where the weights are even",
    worst="max",
    source="arXiv 1701.06538 (there: importance)",
    reads="What balance=[importance] pushes down: its loss is the square of this, per micro-batch.",
)
declare(
    "max_vio",
    TOPIC,
    "max_e(c_e) / mean_e(c_e) - 1",
    span=("0", "E/k - 1"),
    balanced="0",
    collapsed="E/k - 1",
    floor="sqrt((E/k - 1) / T) sqrt(E/(E-1)) Phi^-1((E - 3/8) / (E + 1/4))",
    floor_at=max_vio_floor,
    worst="max",
    source="arXiv 2408.15664; of a row its window, of an evaluation the validation tokens",
    reads="How far the fullest expert is above its share: what sets the step time of a parallel run.",
)


def max_vio(counts_LE: Tensor) -> Tensor:
    """[L, E] -> [L]"""
    counts_LE = counts_LE.double()
    return counts_LE.amax(-1) / counts_LE.mean(-1) - 1


declare(
    "load_gini",
    TOPIC,
    "sum_ij |c_i - c_j| / (2 E^2 mean(c))",
    span=("0", "1 - k/E"),
    balanced="0",
    collapsed="1 - k/E",
    floor="sqrt((E/k - 1) / T) sqrt((E-1) / (pi E))",
    floor_at=gini_floor,
    worst="max",
    source="arXiv 2506.21328",
    reads="Inequality of the load; less ruled by one full expert than CV and MaxVio.",
)


def gini(counts_LE: Tensor) -> Tensor:
    """[L, E] -> [L]; from the sorted counts, without the [E, E] table of differences."""
    E = counts_LE.shape[-1]
    sorted_LE = counts_LE.double().sort(-1).values
    rank_E = torch.arange(1, E + 1, dtype=torch.float64, device=counts_LE.device)
    return (sorted_LE * (2 * rank_E - E - 1)).sum(-1) / (E * sorted_LE.sum(-1))


declare(
    "load_min_max",
    TOPIC,
    "min_e(c_e) / max_e(c_e)",
    span=("0", "1"),
    balanced="1",
    collapsed="0",
    floor="(1 - v) / (1 + v), v = the floor of max_vio",
    floor_at=min_max_floor,
    worst="min",
    source="arXiv 2506.21328",
    reads="0 as soon as one expert gets nothing.",
)


def min_max(counts_LE: Tensor) -> Tensor:
    """[L, E] -> [L]"""
    return counts_LE.amin(-1).double() / counts_LE.amax(-1).double()


declare(
    "load_entropy",
    TOPIC,
    "H(q) / ln E, q_e = c_e / sum(c)",
    span=("0", "1"),
    balanced="1",
    collapsed="ln k / ln E",
    floor="1 - (E/k - 1) / (2 T ln E)",
    floor_at=entropy_floor,
    worst="min",
    reads="Evenness of the load over all tokens; says nothing of how sure the gate is (that is token_entropy). "
    "Undefined for one expert.",
)
declare(
    "effective_experts",
    TOPIC,
    "exp(H(q)), q_e = c_e / sum(c)",
    span=("1", "E"),
    balanced="E",
    collapsed="k",
    floor="E exp(-(E/k - 1) / (2 T))",
    floor_at=effective_floor,
    worst="min",
    reads="As many equally used experts would have the same entropy.",
)


def entropy(weight_LE: Tensor) -> Tensor:
    """Nats of [..., E] weights, normalised here; 0 log 0 = 0. For values only: its gradient at 0 is infinite."""
    weight_LE = weight_LE.double()
    return torch.special.entr(weight_LE / weight_LE.sum(-1, keepdim=True)).sum(-1)


def load_entropy(counts_LE: Tensor) -> Tensor:
    """[L, E] -> [L]; NaN for a single expert."""
    E = counts_LE.shape[-1]
    return entropy(counts_LE) / math.log(E) if E > 1 else entropy(counts_LE) * math.nan


def effective_experts(counts_LE: Tensor) -> Tensor:
    """[L, E] -> [L]"""
    return entropy(counts_LE).exp()


declare(
    "experts_per_token",
    TOPIC,
    "sum_e(c_e) / T",
    span=("0", "E"),
    balanced="k",
    collapsed="k",
    reads="Choices per token, before capacity: k, but where the data decides (relu, top_p, expert_choice), or an "
    "explorer leaves out a second expert.",
)
declare(
    "dead_experts",
    TOPIC,
    f"#{{e: c_e < {DEAD} mean(c)}} over the last {DEAD_WINDOW} updates (the rows that hold them), or all so far",
    span=("0", "E - k"),
    balanced="0",
    collapsed="E - k",
    floor=f"0 once {DEAD_WINDOW} updates hold some hundred tokens per expert",
    floor_at=lambda T, E, k: 0.0,
    worst="max",
    reads="Experts without tokens get no gradient and do not come back by themselves. Undefined where all experts "
    "shape every token's output (dense mixtures, Soft MoE): their counts are of the k largest weights.",
)


def dead_experts(counts_LE: Tensor) -> Tensor:
    """[L, E] -> [L]"""
    counts_LE = counts_LE.double()
    return ((counts_LE < DEAD * counts_LE.mean(-1, keepdim=True)) | (counts_LE == 0)).sum(-1)


declare(
    "dropped_fraction",
    TOPIC,
    "sum_e(selected_e - kept_e) / sum_e selected_e",
    span=("0", "1"),
    balanced="0 at capacity factor CF >= 1",
    collapsed="1 - CF k/E",
    floor="of the order of the floor of load_cv at CF = 1, 0 well above it",
    worst="max",
    reads="Choices that found their expert full; those tokens keep only their residual.",
)


def dropped_fraction(selected_LE: Tensor, kept_LE: Tensor) -> Tensor:
    """[L, E], [L, E] -> [L]"""
    return (selected_LE - kept_LE).sum(-1).double() / selected_LE.sum(-1).double()


for _name, _formula, _balanced, _reads in (
    ("selected", "#{t: expert e is among the k choices of t}", "T k/E", "The router's choice, before capacity."),
    ("kept", "#{t: e was chosen and had room}", "T k/E", "What the expert was trained on."),
    ("dropped", "selected - kept", "0", "Overflow of the capacity limit."),
    ("top1", "#{t: e is the first choice of t}", "T/E", "For k > 1 this collapses before `selected` does."),
    ("importance", "mean_t p_te, the clean gate probability", "1/E", "What the gate believes, noise or not."),
    (
        "gate_mass",
        "sum_t of the combine weights that e received",
        "T w/E, w = a token's whole weight",
        "Its output share.",
    ),
):
    declare(
        _name,
        TOPIC,
        _formula,
        shape="LE",
        span=("0", {"importance": "1", "gate_mass": "T w"}.get(_name, "T")),
        balanced=_balanced,
        collapsed="all at k experts, 0 elsewhere" if _name != "dropped" else "all overflow at k experts",
        floor="see load_cv" if _name in ("selected", "kept", "top1") else "-",
        reads=_reads,
    )
