"""Balance losses of other frameworks, from their formulas, in float64 and plain loops: z[l][t] is a token's logits.

Imports nothing of moe_lab. Tokens of a layer are `sequences` equal stretches.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Logits = Sequence[Sequence[Tensor]]  # [L][T] of [E]


def total(values: Sequence[Tensor]) -> Tensor:
    found = torch.zeros((), dtype=torch.float64)
    for value in values:
        found = found + value
    return found


def softmax(z: Tensor, of: Sequence[int] | None = None) -> list[Tensor]:
    """Over the experts `of` (all when left out); the others have 0."""
    chosen = range(len(z)) if of is None else of
    e = [z[i].exp() if i in chosen else torch.zeros((), dtype=torch.float64) for i in range(len(z))]
    return [value / total(e) for value in e]


def best(z: Tensor, k: int) -> list[int]:
    return sorted(range(len(z)), key=lambda i: -float(z[i].detach()))[:k]


def stretches(tokens: Sequence[Tensor], sequences: int) -> Iterator[Sequence[Tensor]]:
    S = len(tokens) // sequences
    for b in range(sequences):
        yield tokens[b * S : (b + 1) * S]


def dot(tokens: Sequence[Tensor], k: int) -> Tensor:
    """sum_i (count_i / tokens) (mean probability of i), counts over the k best."""
    E, n = len(tokens[0]), len(tokens)
    count = [sum(i in best(z, k) for z in tokens) for i in range(E)]
    p = [softmax(z) for z in tokens]
    return total([count[i] / n * total([p[t][i] for t in range(n)]) / n for i in range(E)])


def hf_mixtral(z: Logits, k: int, sequences: int) -> Tensor:
    return len(z[0][0]) * dot([token for layer in z for token in layer], k)


def hf_switch(z: Logits, k: int, sequences: int) -> Tensor:
    joined = [
        [t for part in parts for t in part] for parts in zip(*(stretches(la, sequences) for la in z), strict=True)
    ]
    return len(z[0][0]) * total([dot(tokens, 1) for tokens in joined]) / sequences


def olmo_core(z: Logits, k: int, sequences: int) -> Tensor:
    return len(z[0][0]) / k * total([dot(layer, k) for layer in z]) / len(z)


def megatron(z: Logits, k: int, sequences: int) -> Tensor:
    return len(z[0][0]) / k * total([dot(layer, k) for layer in z])


def libmoe(z: Logits, k: int, sequences: int) -> Tensor:
    E = len(z[0][0])
    return total([E / k * dot(part, k) / sequences for layer in z for part in stretches(layer, sequences)])


def libmoe_entropy(z: Logits, k: int, sequences: int) -> Tensor:
    found = []
    for layer in z:
        for part in stretches(layer, sequences):
            p = [softmax(token) for token in part]
            mean = [total([p[t][i] for t in range(len(part))]) / len(part) for i in range(len(part[0]))]
            found.append(total([m * m.log() for m in mean]) / sequences)
    return total(found)


def first_choice(z: Logits, k: int, sequences: int) -> Tensor:
    E = len(z[0][0])
    return total([E * dot(part, 1) / sequences for layer in z for part in stretches(layer, sequences)])


def gshard_paper(z: Logits, k: int, sequences: int) -> Tensor:
    E = len(z[0][0])
    return total([dot(part, 1) / E / sequences for layer in z for part in stretches(layer, sequences)])


def nano_moe(z: Logits, k: int, sequences: int) -> Tensor:
    E, found = len(z[0][0]), []
    for layer in z:
        p = [softmax(token, best(token, k)) for token in layer]
        for i in range(E):
            count = sum(i in best(token, k) for token in layer)
            found.append(E * count / len(layer) * total([row[i] for row in p]) / len(layer))
    return total(found)


def deepseek_v3(z: Logits, k: int, sequences: int) -> Tensor:
    E, found = len(z[0][0]), []
    for layer in z:
        for part in stretches(layer, sequences):
            s = [[1 / (1 + (-token[i]).exp()) for i in range(E)] for token in part]
            p = [[value / total(row) for value in row] for row in s]
            for i in range(E):
                f = E / (k * len(part)) * sum(i in best(token, k) for token in part)
                found.append(f * total([row[i] for row in p]) / len(part) / sequences)
    return total(found)


def importance(z: Logits, k: int, correction: int) -> Tensor:
    found, E = [], len(z[0][0])
    for layer in z:
        gates = [softmax(token, best(token, k)) for token in layer]
        mass = [total([row[i] for row in gates]) for i in range(E)]
        mean = total(mass) / E
        found.append(total([(m - mean) ** 2 for m in mass]) / (E - correction) / mean**2)
    return total(found)


def shazeer_importance(z: Logits, k: int, sequences: int) -> Tensor:
    return importance(z, k, 0)


def importance_of_samples(z: Logits, k: int, sequences: int) -> Tensor:
    return importance(z, k, 1)


def load(z: Logits, k: int, correction: int) -> Tensor:
    """Of noise that happened to be 0, its deviation ln(1 + e^0)."""
    found, E = [], len(z[0][0])
    for layer in z:
        loads = [torch.zeros((), dtype=torch.float64) for _ in range(E)]
        for token in layer:
            for i in range(E):
                others = [token[j] for j in range(E) if j != i]
                kth = others[best(torch.stack(others), k)[-1]]
                loads[i] = loads[i] + (1 + torch.erf((token[i] - kth) / math.log(2) / math.sqrt(2))) / 2
        mean = total(loads) / E
        found.append(total([(x - mean) ** 2 for x in loads]) / (E - correction) / mean**2)
    return total(found)


def shazeer_load(z: Logits, k: int, sequences: int) -> Tensor:
    return load(z, k, 0)


def load_of_samples(z: Logits, k: int, sequences: int) -> Tensor:
    return load(z, k, 1)


def z_sum(z: Logits, k: int, sequences: int) -> Tensor:
    return total([total([v.exp() for v in token]).log() ** 2 / len(layer) for layer in z for token in layer])


def z_mean(z: Logits, k: int, sequences: int) -> Tensor:
    return z_sum(z, k, sequences) / len(z)


CV_SQUARED = ("shazeer_importance", "importance_of_samples", "shazeer_load", "load_of_samples")


def at_balance(name: str, E: int, k: int, L: int) -> float:
    """Every expert gets as much, in choices and in probability."""
    same = {"hf_mixtral": k, "hf_switch": 1, "olmo_core": 1, "libmoe_entropy": -L * math.log(E), "nano_moe": L * k}
    return {**same, "gshard_paper": L / E**2, **dict.fromkeys(CV_SQUARED, 0)}.get(name, L)


def at_collapse(name: str, E: int, k: int, L: int) -> float:
    """All tokens give all of their probability to the same k experts, in equal parts; first choices are shared too."""
    even = {"hf_mixtral": E, "hf_switch": E / k, "olmo_core": E / k, "libmoe_entropy": -L * math.log(k)}
    even |= {"nano_moe": L * E, "gshard_paper": L / (E * k)}
    cv = {name: L * (E / k - 1) * (E / (E - 1) if name.endswith("samples") else 1) for name in CV_SQUARED}
    return {**even, **cv}.get(name, L * E / k)
