"""Where router rows point: to their expert's input weights, to each other, to the tokens they get.

Shapes: L layers, T tokens, D width, E and G experts, F input-side neurons of an expert.
The identity behind it: on one token the gradients of the router row and of the expert's input-side rows are both
collinear with the input, so that matched directions accumulate the same tokens (arXiv 2605.12476).
"""

import math

import torch
from torch import Tensor

from moe_lab.observe.metric import MOST_EXPERTS, declare

TOPIC = "Geometry: where router rows point"
ALIKE = 1e-6  # of the norm of a table of cosines: below it what is left after centring is rounding
MOST_COSINES = 2**22  # of neurons with router rows, held at once
_COUPLING = "arXiv 2605.12476; the statistic is ours"


def cosine_baseline(D: int) -> float:
    """Mean |cos| of random directions in D dimensions (exact to 1/(4D) of itself)."""
    return math.sqrt(2 / (math.pi * D))


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a row of zeros has no direction and becomes NaN."""
    x = x.double()
    return x / x.norm(dim=-1, keepdim=True)


def mean_of(x: Tensor, keep: Tensor) -> Tensor:
    """Mean over the kept entries of the last two dimensions that are defined; NaN where there is none."""
    keep = keep & ~x.isnan()
    return x.masked_fill(~keep, 0).sum((-2, -1)) / keep.sum((-2, -1))


def coupling(router_ED: Tensor, read_in_EFD: Tensor, real_EF: Tensor | None = None) -> dict[str, Tensor]:
    """Cosines of every router row with every input-side neuron, averaged over the neurons of an expert: 0-dim each.

    real_EF: False where a neuron is padding, which does not count; None where none is.
    In fp32, unless the weights are fp64: each mean is over many cosines, and the products are most of a row's cost.
    """
    rows_ED = unit(router_ED).to(read_in_EFD.dtype)
    G, F, D = read_in_EFD.shape
    at_once = max(1, MOST_COSINES // (G * F))  # experts; the table of all cosines of a wide layer would not fit
    signed_GE, absolute_GE = [], []
    norm_EF = torch.linalg.vector_norm(read_in_EFD, dim=-1)  # a neuron of zeros gives NaN
    weight_EF = 1 / (F * norm_EF) if real_EF is None else real_EF / (real_EF.sum(1, keepdim=True) * norm_EF + ~real_EF)
    for neurons_GFD, weight_GF in zip(read_in_EFD.split(at_once), weight_EF.split(at_once), strict=True):
        product_GFE, weight_G1F = neurons_GFD @ rows_ED.T, weight_GF[:, None]
        signed_GE.append((weight_G1F @ product_GFE)[:, 0])
        absolute_GE.append((weight_G1F @ product_GFE.abs_())[:, 0])
    same_EE = torch.eye(G, dtype=torch.bool, device=router_ED.device)
    found: dict[str, Tensor] = {"coupling_baseline": rows_ED.new_tensor(cosine_baseline(D))}
    for prefix, parts in (("coupling", absolute_GE), ("coupling_signed", signed_GE)):
        cosine_GE = torch.cat(parts).double()
        matched, mismatched = mean_of(cosine_GE, same_EE), mean_of(cosine_GE, ~same_EE)
        found |= {
            f"{prefix}_matched": matched,
            f"{prefix}_mismatched": mismatched,
            f"{prefix}_gap": matched - mismatched,
            f"{prefix}_z": permutation_z(cosine_GE),
        }
    return found


def permutation_z(x_EE: Tensor) -> Tensor:
    """The diagonal's sum, in standard deviations from its mean over all E! orders of the rows; 0-dim.

    Exact, by the moments of Hoeffding 1951 (Annals of Mathematical Statistics 22, a combinatorial central limit
    theorem). NaN where all orders give the same, as with experts that are copies of one.
    """
    centred_EE = x_EE - x_EE.mean(0) - x_EE.mean(1, keepdim=True) + x_EE.mean()
    size = torch.linalg.vector_norm(centred_EE)
    size = size.masked_fill(size < ALIKE * torch.linalg.vector_norm(x_EE), math.nan)
    return math.sqrt(len(x_EE) - 1) * centred_EE.trace() / size


for _prefix, _size, _low in (("coupling", "|cos|", "0"), ("coupling_signed", "cos", "-1")):
    _base = "sqrt(2 / (pi D))" if _low == "0" else "0"
    declare(
        f"{_prefix}_matched",
        TOPIC,
        f"mean_e mean_n {_size}(r_e, W_e[n]), W_e[n] = input-side neuron n of expert e",
        span=(_low, "1"),
        balanced="any",
        collapsed="any",
        floor=_base,
        worst="min",
        source=_COUPLING,
        reads="How far a router row points along what its own expert reads.",
        when="training",
    )
    declare(
        f"{_prefix}_mismatched",
        TOPIC,
        f"mean_(e != g) mean_n {_size}(r_e, W_g[n])",
        span=(_low, "1"),
        balanced="any",
        collapsed="any",
        floor=_base,
        source=_COUPLING,
        reads="The same with other experts' neurons: what all directions share.",
        when="training",
    )
    declare(
        f"{_prefix}_gap",
        TOPIC,
        f"{_prefix}_matched - {_prefix}_mismatched",
        span=("-1" if _low == "0" else "-2", "1" if _low == "0" else "2"),
        balanced="any",
        collapsed="any",
        floor=f"0, give or take {'0.6' if _low == '0' else '1'} / sqrt(D E F)",
        worst="min",
        source=_COUPLING,
        reads="Above 0: router and expert collected the same tokens. Read it against coupling_baseline.",
        when="training",
    )
    declare(
        f"{_prefix}_z",
        TOPIC,
        f"sqrt(E-1) sum_e C_ee / ||C||, C_ge = mean_n {_size}(r_e, W_g[n]) less row and column means, plus the mean",
        span=("-(E-1)", "E-1"),
        balanced="any",
        collapsed="any",
        floor="0, give or take 1: its mean and deviation over all E! pairings of rows with experts",
        worst="min",
        source=_COUPLING + "; Hoeffding 1951",
        reads="The gap against a permutation null, in its standard deviations: above 2 or 3, rows know their experts.",
        when="training",
    )
declare(
    "coupling_baseline",
    TOPIC,
    "sqrt(2 / (pi D))",
    span=("0", "1"),
    balanced="a constant of the width",
    collapsed="a constant of the width",
    reads="Mean |cos| of random directions: 0.070 at D = 128, 0.025 at 1024.",
    when="training",
)


def cosine_matrix(router_ED: Tensor) -> Tensor:
    """Cosine of every router row with every other, [E, E]; NaN for rows of zeros."""
    rows_ED = unit(router_ED)
    return rows_ED @ rows_ED.T


def router_cosines(router_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Mean pairwise cosine of the router rows, signed and absolute, 0-dim; NaN for one expert or rows of zeros."""
    cosine_EE = cosine_matrix(router_ED)
    pairs_EE = torch.ones_like(cosine_EE, dtype=torch.bool).triu(1)
    return mean_of(cosine_EE, pairs_EE), mean_of(cosine_EE.abs(), pairs_EE)


declare(
    "router_cos",
    TOPIC,
    "mean_(e < g) cos(r_e, r_g)",
    span=("-1/(E-1)", "1"),
    balanced="any",
    collapsed="any",
    floor="0, give or take sqrt(2 / (D E (E-1)))",
    worst="max",
    source="arXiv 2605.12476",
    reads="Rows that point one way cannot tell tokens apart. Auxiliary losses are reported to raise it.",
)
declare(
    "router_cos_abs",
    TOPIC,
    "mean_(e < g) |cos(r_e, r_g)|",
    span=("0", "1"),
    balanced="any",
    collapsed="any",
    floor="sqrt(2 / (pi D))",
    worst="max",
    source="arXiv 2605.12476",
    reads="As router_cos, blind to sign: opposite rows also lie on one line.",
)


declare(
    "router_cos_matrix",
    TOPIC,
    "cos(r_e, r_g), to four digits",
    shape="LEE",
    span=("-1", "1"),
    balanced="any",
    collapsed="any",
    floor="0, give or take 1 / sqrt(D), off the diagonal",
    source="arXiv 2605.12476",
    reads=f"Which experts compete for the same tokens; router_cos is its mean. Left out beyond {MOST_EXPERTS} experts.",
    when="evaluation",
)


def centroid_cosines(router_ED: Tensor, token_sum_ED: Tensor, count_E: Tensor) -> tuple[Tensor, Tensor]:
    """Router rows against the mean of their tokens, centred and raw, 0-dim each, over experts that have tokens.

    Centred: the mean of all chosen tokens is taken off the centroid and the mean row off the row. All hidden states
    share a common part, which no softmax can see and which would make every raw cosine alike.
    """
    count_E1 = count_E.double()[:, None]
    centroid_ED = token_sum_ED.double() / count_E1  # NaN without tokens
    middle_D = token_sum_ED.double().sum(0) / count_E1.sum()
    rows_ED = router_ED.double()
    centred_E = (unit(rows_ED - rows_ED.mean(0)) * unit(centroid_ED - middle_D)).sum(-1)
    raw_E = (unit(rows_ED) * unit(centroid_ED)).sum(-1)
    return centred_E.nanmean(), raw_E.nanmean()


declare(
    "centroid_cos",
    TOPIC,
    "mean_e cos(r_e - mean r, mu_e - mu), mu_e = running mean of tokens that chose e, mu of all choices; "
    "a micro-batch gives at least 256 E of its tokens, or all",
    span=("-1", "1"),
    balanced="any",
    collapsed="undefined at k experts that get the same tokens",
    floor="0 for random choice, give or take 1 / sqrt(D E); well above 0 for argmax at a random start",
    worst="min",
    source="arXiv 2605.12476; half-life of the mean: 69 updates",
    reads="How much of a prototype a row is. Clean argmax alone makes it positive, so compare it over time.",
)
declare(
    "centroid_cos_raw",
    TOPIC,
    "mean_e cos(r_e, mu_e)",
    span=("-1", "1"),
    balanced="any",
    collapsed="any",
    floor="0, give or take 1 / sqrt(D)",
    reads="Not centred: the part that all tokens share counts too.",
)


def pearson(x_LN: Tensor, y_LN: Tensor) -> Tensor:
    """[L, N], [L, N] -> [L]; NaN where either does not vary."""
    x_LN, y_LN = x_LN.double(), y_LN.double()
    x_LN, y_LN = x_LN - x_LN.mean(-1, keepdim=True), y_LN - y_LN.mean(-1, keepdim=True)
    return (x_LN * y_LN).sum(-1) / (x_LN.norm(dim=-1) * y_LN.norm(dim=-1))


def ranks(x_N: Tensor) -> Tensor:
    """Ranks from 1, ties share the mean of theirs, fp64 [N]."""
    _, inverse_N, count_U = x_N.unique(return_inverse=True, return_counts=True)
    last_U = count_U.cumsum(0).double()
    return (last_U - (count_U - 1) / 2)[inverse_N]


def spearman(x_LN: Tensor, y_LN: Tensor) -> Tensor:
    """[L, N], [L, N] -> [L]: Pearson of the ranks."""
    return pearson(torch.stack([ranks(x) for x in x_LN]), torch.stack([ranks(y) for y in y_LN]))


for _name, _of in (("pearson", "values"), ("spearman", "ranks")):
    declare(
        f"score_act_{_name}",
        TOPIC,
        f"correlation, of the {_of}, of the clean logit z_te with mean_n of the input-side activations of expert e, "
        "over pairs (t, e chosen by t) of the probe batch",
        span=("-1", "1"),
        balanced="any",
        collapsed="any",
        floor="0, give or take 1 / sqrt(pairs)",
        worst="min",
        source="arXiv 2605.12476; which pairs and which mean are ours",
        reads="Above 0: an expert's neurons fire more for tokens that the router scores higher.",
        when="evaluation",
    )
