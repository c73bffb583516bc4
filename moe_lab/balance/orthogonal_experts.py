"""Experts that read different directions of their input."""

import torch
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "orthogonal_experts")
class OrthogonalExperts(Balancer):
    """Mean over pairs of experts of the squared cosine between their input-side matrices (of gated experts the
    gate's), each read as one vector. Trains the experts and not the router, and sees no token.

    0 where all are orthogonal, 1 where all are copies (one dense layer upcycled without noise). Weights are what
    arXiv 2601.00457 makes orthogonal, and it finds that activations do not follow; arXiv 2505.22323 makes outputs on
    the same token orthogonal, which needs experts that did not choose it. Matrices as vectors, squared, the mean
    over pairs: our choice.
    """

    of_weights = True
    for_router = False

    def __init__(self, *, weight: Schedule = constant(0.01)):
        self.weight = weight

    def loss(self, routing: Routing, layer: Layer = Layer()) -> Tensor:
        assert layer.moe is not None
        w_EN = layer.moe.experts.read_in_EFD().flatten(1)
        E = len(w_EN)
        unit_EN = torch.nn.functional.normalize(w_EN, dim=-1)
        cosine_EE = (unit_EN @ unit_EN.T).tril(-1)
        return cosine_EE.square().sum() / max(1, E * (E - 1) / 2)
