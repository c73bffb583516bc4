"""Gaussian noise on the logits."""

from torch import Tensor

from moe_lab.config import option
from moe_lab.explore.base import LogitNoise
from moe_lab.routing import Draw
from moe_lab.schedules import Schedule, constant


@option("explore", "gaussian")
class Gaussian(LogitNoise):
    """logits + N(0, strength^2), independent per token and expert, before choice and gate."""

    draws = {"logits": Draw("gaussian", "TE")}

    def __init__(self, *, strength: Schedule = constant(1.0)):
        super().__init__(strength=strength)

    def logits(self, logits_TE: Tensor, drawn, strength: Tensor) -> Tensor:
        return logits_TE + drawn["logits"] * strength

    def noise_std(self, strength: Tensor) -> Tensor:
        return strength
