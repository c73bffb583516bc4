"""Noise on what the router reads; the experts get the tokens as they are."""

import torch
from torch import Tensor

from moe_lab.config import option
from moe_lab.explore.base import Explorer
from moe_lab.routing import Draw
from moe_lab.schedules import Probability, Schedule, constant


@option("explore", "jitter")
class Jitter(Explorer):
    """x * Uniform(1 - strength, 1 + strength), independent per token and channel (Switch, arXiv 2101.03961).

    As in Switch, the scores that balance losses see carry it as well.
    """

    touches = "input"
    draws = {"channels": Draw("uniform", "TD")}

    def __init__(self, *, strength: Schedule = constant(0.01)):
        super().__init__(strength=strength)

    def input(self, x_TD: Tensor, drawn, strength: Tensor) -> Tensor:
        return x_TD * (1 + strength * (2 * drawn["channels"] - 1))


@option("explore", "dropout")
class Dropout(Explorer):
    """Each channel of x is 0 with probability strength, else x / (1 - strength): Switch's "input dropout"."""

    touches = "input"
    draws = {"channels": Draw("uniform", "TD")}

    def __init__(self, *, strength: Probability = constant(0.1)):
        super().__init__(strength=strength)

    def input(self, x_TD: Tensor, drawn, strength: Tensor) -> Tensor:
        # From 1 on nothing is left: zeros, and no 0 / 0 in the gradient.
        return torch.where(drawn["channels"] < strength, 0, x_TD / (1 - strength).clamp_min(1e-6))
