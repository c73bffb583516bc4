"""Explorers from conf/explore at work on a router small enough to check by hand, and the loops that they are held to.

Shapes: T tokens, D width, E experts.
"""

from pathlib import Path
from typing import Any

import torch
from layers import CONF, preset
from oracles import explore as oracle
from torch import Tensor

from moe_lab import seeding
from moe_lab.config import build
from moe_lab.explore.base import Explorer
from moe_lab.routing import Exploring

EXPLORERS = sorted(path.stem for path in Path(CONF, "explore").glob("*.yaml"))
PROBABILITIES = ("dropout", "expert_dropout", "reroute", "router_dropout")


def explorer(name: str, **options: Any) -> Explorer:
    return build("explore", preset("explore", name, **options))


def at_work(name: str, T: int, D: int, E: int, strength: float, key: int = 0, **options: Any) -> Exploring:
    """An explorer with its draws, in float64 so that a comparison can be exact."""
    found, sizes = explorer(name, **options), {"TE": (T, E), "TD": (T, D), "T": (T,), "E": (E,)}
    drawn = {n: seeding.noise(d.kind, sizes[d.shape], "test", name, n, key).double() for n, d in found.draws.items()}
    return Exploring(found, torch.tensor(strength, dtype=torch.float64), drawn)


def in_loops(name: str, drawn: dict[str, Tensor], s: float, k: int, of: str = "share") -> dict[str, Any]:
    """What an explorer does, as oracle.weights takes it."""

    def noise(t: int, z_E: Tensor) -> Tensor:
        return torch.stack([z + s * v for z, v in zip(z_E, drawn["logits"][t], strict=True)])

    hooks: dict[str, dict[str, Any]] = {
        "gaussian": {"noise": noise},
        "gumbel": {"noise": noise},
        "jitter": {"heard": lambda t, x_D: oracle.jittered(x_D, drawn["channels"][t], s)},
        "dropout": {"heard": lambda t, x_D: oracle.dropped_out(x_D, drawn["channels"][t], s)},
        "reroute": {"rank": lambda t, rank_E: drawn["experts"][t].tolist() if drawn["tokens"][t] < s else rank_E},
        "expert_dropout": {"allowed": lambda t: oracle.can_be_chosen(drawn["experts"], s, k)},
        "router_dropout": {"allowed": lambda t: oracle.can_be_chosen(drawn["experts"][t], s, k)},
        "second_expert": {"second": lambda t, g1, g2: oracle.keeps_second(g1, g2, float(drawn["tokens"][t]), s, of)},
    }
    return hooks[name]
