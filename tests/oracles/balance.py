"""Balance losses and bias updates from their papers' formulas, float64, one token and one expert at a time.

Imports nothing of the project. Tokens and experts are lists; a probability or weight may be a tensor with a gradient.
chosen[t]: the experts of token t, strongest first. Losses are torch scalars, so that autograd runs over the loops.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Chosen = Sequence[Sequence[int]]


def number(x: float | Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def total(values: Sequence[Tensor] | Sequence[float]) -> Tensor:
    found = number(0.0)
    for value in values:
        found = found + value
    return found


def softmax(logits_TE: Tensor) -> list[list[Tensor]]:
    """Each token's exp(z) over its row sum, shifted by the row's largest."""
    rows = []
    for z_E in logits_TE:
        top = max(z_E.tolist())
        exps = [torch.exp(z - top) for z in z_E]
        rows.append([e / total(exps) for e in exps])
    return rows


def normalised_sigmoid(logits_TE: Tensor) -> list[list[Tensor]]:
    """s' = s / sum_j s_j with s = sigmoid(z) (DeepSeek-V3)."""
    rows = []
    for z_E in logits_TE:
        s_E = [1 / (1 + torch.exp(-z)) for z in z_E]
        rows.append([s / total(s_E) for s in s_E])
    return rows


def counts(chosen: Chosen, E: int) -> list[int]:
    found = [0] * E
    for experts in chosen:
        for e in experts:
            found[e] += 1
    return found


def mean_probs(p: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [total([row[e] for row in p]) / len(p) for e in range(len(p[0]))]


def switch(p: Sequence[Sequence[Tensor]], chosen: Chosen) -> Tensor:
    """N sum_i f_i P_i, f_i the share of all assignments (2101.03961; with k > 1 as in DeepSeek, 2408.15664)."""
    E = len(p[0])
    c, P = counts(chosen, E), mean_probs(p)
    return E * total([c[e] / sum(c) * P[e] for e in range(E)])


def gshard(p: Sequence[Sequence[Tensor]], chosen: Chosen) -> Tensor:
    """E^2 times 1/E sum_e (c_e / S) m_e, c_e how many tokens have e as their first choice (2006.16668)."""
    E, S = len(p[0]), len(p)
    first, m = counts([experts[:1] for experts in chosen], E), mean_probs(p)
    return E**2 * total([first[e] / S * m[e] for e in range(E)]) / E


def cv_squared(x: Sequence[Tensor]) -> Tensor:
    mean = total(x) / len(x)
    return total([(value - mean) ** 2 for value in x]) / len(x) / mean**2


def importance(weights: Sequence[Sequence[Tensor]], chosen: Chosen, E: int) -> Tensor:
    """CV(sum of gate weights)^2 (1701.06538); weights[t] belong to chosen[t]."""
    mass = [number(0.0) for _ in range(E)]
    for w_K, experts in zip(weights, chosen, strict=True):
        for w, e in zip(w_K, experts, strict=True):
            mass[e] = mass[e] + w
    return cv_squared(mass)


def load(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, k: int) -> Tensor:
    """CV(Load)^2, Load_i = sum_x Phi((clean_i - k-th largest noisy of the others) / std_i) (1701.06538, appendix A)."""
    T, E = clean_TE.shape
    found = [number(0.0) for _ in range(E)]
    for t in range(T):
        for i in range(E):
            others = sorted((noisy_TE[t, j] for j in range(E) if j != i), key=lambda x: -float(x.detach()))
            z = (clean_TE[t, i] - others[k - 1]) / std_TE[t, i]
            found[i] = found[i] + 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    return cv_squared(found)


def squared_load(p: Sequence[Sequence[Tensor]]) -> Tensor:
    """E sum_i (P_i - 1/E)^2: L_b of Bengio et al. 2015 (1511.06297) with the rate 1/E, times E."""
    E = len(p[0])
    return E * total([(m - 1 / E) ** 2 for m in mean_probs(p)])


def kl_uniform(p: Sequence[Sequence[Tensor]]) -> Tensor:
    """KL(uniform || P) = sum_i 1/E log((1/E) / P_i)."""
    E = len(p[0])
    return total([1 / E * torch.log(1 / E / m) for m in mean_probs(p)])


def entropy_of(p_E: Sequence[Tensor]) -> Tensor:
    return total([-value * torch.log(value) if value > 0 else number(0.0) for value in p_E])


def entropy(p: Sequence[Sequence[Tensor]], of: str) -> Tensor:
    """mean: log E - H(P). token: mean H(p_t). mutual_information: log E - (H(P) - mean H(p_t))."""
    balance = math.log(len(p[0])) - entropy_of(mean_probs(p))
    confidence = total([entropy_of(row) for row in p]) / len(p)
    return {"mean": balance, "token": confidence, "mutual_information": balance + confidence}[of]


def variance(p: Sequence[Sequence[Tensor]]) -> Tensor:
    """1 - 1/E - sum_i var_t(p_ti): the variance term of Bengio et al. 2015, counted down from its largest value."""
    E, P = len(p[0]), mean_probs(p)
    spread = [total([(row[e] - P[e]) ** 2 for row in p]) / len(p) for e in range(E)]
    return 1 - 1 / E - total(spread)


def seq_aux(logits_TE: Tensor, chosen: Chosen, seq_len: int) -> Tensor:
    """Mean over sequences of sum_i f_i P_i, f_i = N/(K T) sum_t 1[i chosen], P_i = 1/T sum_t s'_ti (2412.19437)."""
    T, E = logits_TE.shape
    found = []
    for start in range(0, T, seq_len):
        here = range(start, start + seq_len)
        s, K = normalised_sigmoid(logits_TE[start : start + seq_len]), len(chosen[start])
        f, P = [0.0] * E, mean_probs(s)
        for t in here:
            for e in chosen[t]:
                f[e] += E / (K * seq_len)
        found.append(total([f[e] * P[e] for e in range(E)]))
    return total(found) / len(found)


def by_sequence(loss: Callable[[slice], Tensor], tokens: int, seq_len: int) -> Tensor:
    """A loss of each sequence on its own, then their mean."""
    found = [loss(slice(start, start + seq_len)) for start in range(0, tokens, seq_len)]
    return total(found) / len(found)


def running_means(means: Sequence[float], decay: float) -> list[float]:
    """sum_v d^(u-v) m_v / sum_v d^(u-v) at each update u: a decaying mean without the pull of its start."""
    found = []
    for u in range(len(means)):
        weights = [decay ** (u - v) for v in range(u + 1)]
        found.append(sum(w * m for w, m in zip(weights, means, strict=False)) / sum(weights))
    return found


def simbal(rows_ED: Tensor) -> Tensor:
    """|| R R^T - I ||_1, entry by entry (2506.14038)."""
    E, D = rows_ED.shape
    found = number(0.0)
    for i in range(E):
        for j in range(E):
            dot = total([rows_ED[i, d] * rows_ED[j, d] for d in range(D)])
            found = found + torch.abs(dot - (1.0 if i == j else 0.0))
    return found


def erc_reach(rows_ED: Tensor) -> list[float]:
    """eps_i = ||R_i - R_j|| / (2 ||R_i||), j the nearest other row."""
    rows = rows_ED.detach()
    E = len(rows)
    if E == 1:
        return [0.0]
    return [
        min(float((rows[i] - rows[j]).norm()) for j in range(E) if j != i) / (2 * float(rows[i].norm()))
        for i in range(E)
    ]


def erc(rows_ED: Tensor, w_EFD: Tensor, uniform_ED: Tensor, alpha: float) -> Tensor:
    """1/n^2 sum_i sum_{j != i} max(M_ij - a M_ii, 0) + max(M_ji - a M_ii, 0), M_ij = ||R~_i W_j|| (2512.23447)."""
    E, F, D = w_EFD.shape
    eps = erc_reach(rows_ED)

    def activation(i: int, j: int) -> Tensor:
        moved = [rows_ED[i, d] * (1 - eps[i] + 2 * eps[i] * float(uniform_ED[i, d])) for d in range(D)]
        return torch.sqrt(total([total([w_EFD[j, f, d] * moved[d] for d in range(D)]) ** 2 for f in range(F)]))

    M = [[activation(i, j) for j in range(E)] for i in range(E)]
    found = number(0.0)
    for i in range(E):
        for j in range(E):
            if j != i:
                found = found + torch.relu(M[i][j] - alpha * M[i][i]) + torch.relu(M[j][i] - alpha * M[i][i])
    return found / E**2


def orthogonal_experts(w_EFD: Tensor) -> Tensor:
    """Mean over pairs of experts of the squared cosine between their input matrices, read as one long vector each."""
    E = len(w_EFD)
    found = []
    for i in range(E):
        for j in range(i + 1, E):
            a, b = w_EFD[i].flatten(), w_EFD[j].flatten()
            found.append(((a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())) ** 2)
    return total(found) / len(found) if found else number(0.0)


def loss_free(
    bias: Sequence[float], load_E: Sequence[int], rate: float, update: str, decay: float = 0.0, recentre: bool = False
) -> list[float]:
    """b_i <- (1 - decay) b_i + rate sign(mean - load_i), or rate (mean - load_i) / mean; then its mean taken off."""
    mean = sum(load_E) / len(load_E)
    moved = []
    for b, load_e in zip(bias, load_E, strict=True):
        error = mean - load_e
        step = (error > 0) - (error < 0) if update == "sign" else error / mean
        moved.append((1 - decay) * b + rate * step)
    middle = sum(moved) / len(moved) if recentre else 0.0
    return [b - middle for b in moved]


def quantile_bias(merit_TE: Tensor, bias: Sequence[float], k: int) -> list[float]:
    """Each expert's k/E quantile over the tokens of what its bias would have to be for the token to choose it (the
    (k+1)-th best biased merit minus its own merit), the mean over experts taken off. Quantile: the order statistic
    that lets T k / E tokens in, halfway to the next."""
    T, E = merit_TE.shape
    needed: list[list[float]] = [[] for _ in range(E)]
    for t in range(T):
        ranked = sorted((float(merit_TE[t, e]) + bias[e] for e in range(E)), reverse=True)
        for e in range(E):
            needed[e].append(ranked[k] - float(merit_TE[t, e]))
    found = []
    for values in needed:
        values.sort()
        n = round(T * k / E)  # this many get in; any bias between two neighbours does
        found.append((values[n - 1] + values[n]) / 2)
    return [b - sum(found) / E for b in found]
