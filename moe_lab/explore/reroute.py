"""Random experts for a few tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lab.config import option, registered
from moe_lab.explore.base import SetChoice
from moe_lab.routing import Draw
from moe_lab.schedules import Probability, constant


@option("explore", "reroute")
class Reroute(SetChoice):
    """With probability strength a token goes to k experts at random, any k of them as likely: epsilon-greedy.

    It is weighted by the gate values of the experts that it got, which is how the gate learns of them. Our form of a
    common idea: no paper fixes it.
    """

    draws = {"tokens": Draw("uniform", "T"), "experts": Draw("uniform", "TE")}

    def __init__(self, *, strength: Probability = constant(0.05)):
        super().__init__(strength=strength)

    def rank(self, rank_TE: Tensor, drawn, strength: Tensor) -> Tensor:
        return torch.where(drawn["tokens"][:, None] < strength, drawn["experts"].to(rank_TE.dtype), rank_TE)

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        found, router = super().conflicts(node, cfg), cfg["router"]["name"]
        if not found and registered("router")[router].every_expert:
            return [f"explore.reroute: router={router} gives every token to every expert; there is none to try"]
        return found
