"""Gumbel noise on the logits."""

from torch import Tensor

from moe_lab.config import option
from moe_lab.explore.base import LogitNoise
from moe_lab.routing import Draw
from moe_lab.schedules import Schedule, constant


@option("explore", "gumbel")
class Gumbel(LogitNoise):
    """logits + strength * Gumbel(0, 1): at strength 1 the best expert is a sample of softmax(logits)."""

    draws = {"logits": Draw("gumbel", "TE")}

    def __init__(self, *, strength: Schedule = constant(1.0)):
        super().__init__(strength=strength)

    def logits(self, logits_TE: Tensor, drawn, strength: Tensor) -> Tensor:
        return logits_TE + drawn["logits"] * strength
