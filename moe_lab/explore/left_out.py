"""Experts that cannot be chosen for a while; at least k of them always can."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lab.config import option
from moe_lab.explore.base import Explorer, first_of
from moe_lab.routing import Draw
from moe_lab.schedules import Probability, constant


class LeftOut(Explorer):
    """An expert is out where its draw is below strength, but for the k with the largest draws.

    Its logit is -inf then: it is out of the softmax as well, and only the others get a gradient through the gate.
    """

    overrules = True

    def allowed(self, logits_TE: Tensor, drawn, strength: Tensor, k: int) -> Tensor:
        u = drawn["experts"]
        return u >= torch.minimum(strength, u.topk(k, -1).values[..., -1:])

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        if (first := first_of(LeftOut, cfg)) is not node:  # of those that both leave in there may be none
            return [f"explore.{node['name']}: explore.{first['name']} leaves experts out already; take one of them"]
        return super().conflicts(node, cfg)


@option("explore", "expert_dropout")
class ExpertDropout(LeftOut):
    """An expert of a layer is out for a whole update, of all its micro-batches, with probability strength.

    How many must stay, and that the softmax is over the others, is our choice: the papers' "expert dropout" (Switch,
    fine-tuning) is dropout inside the experts.
    """

    draws = {"experts": Draw("uniform", "E")}

    def __init__(self, *, strength: Probability = constant(0.1)):
        super().__init__(strength=strength)


@option("explore", "router_dropout")
class RouterDropout(LeftOut):
    """Each token's logits are left out one by one with probability strength.

    "Router dropout" names several things elsewhere; this reading, dropout on the router's output, is our choice.
    """

    draws = {"experts": Draw("uniform", "TE")}

    def __init__(self, *, strength: Probability = constant(0.1)):
        super().__init__(strength=strength)
