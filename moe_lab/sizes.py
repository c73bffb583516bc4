"""How many experts run, and how wide: what a config asks for, split by its granularity.

Fine-grained experts (DeepSeekMoE, arXiv 2401.06066): every expert is split into `granularity` experts of its width over
`granularity`, and as many times more of them are chosen, so that the active parameters stay what they were.
"""

import math
from collections.abc import Mapping
from typing import Any

COUNTS = ("num", "zero_experts", "copy_experts", "constant_experts")
CHOICES = ("k", "most")  # of a router: how many experts a token gets, at most


def split(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A complete config whose counts and choices per token are those that run; widths stay as they are told."""
    experts, g = cfg["experts"], cfg["experts"]["granularity"]
    finer = {name: g * experts[name] for name in COUNTS} | {"granularity": 1}
    chosen = {name: g * n for name in CHOICES if (n := cfg["router"].get(name)) is not None}
    return {**cfg, "experts": {**experts, **finer}, "router": {**cfg["router"], **chosen}}


def routed(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """(E, k) of a complete config: the experts that a router chooses among, and how many each token gets."""
    fine = split(cfg)
    return sum(fine["experts"][name] for name in COUNTS), fine["router"]["k"]


def usual_width(dim: int, sides: int) -> int:
    """4 dim, or 8/3 dim for gated experts, which hold as many parameters with three matrices; whole 16s."""
    return 16 * math.ceil(8 * dim / (1 + sides) / 16)


def repeated(pattern: list[int], num: int) -> list[int]:
    """Widths of `num` experts, which take turns."""
    return pattern * (num // len(pattern))
