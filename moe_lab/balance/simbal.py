"""SimBal: router rows that stay orthonormal keep similar tokens together, and spread the others."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.balance.rows import router_rows, without_rows
from moe_lab.config import option
from moe_lab.model.moe import MoE
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant
from moe_lab.sizes import routed


@option("balance", "simbal")
class SimBal(Balancer):
    """||R R^T - I||_1, entry by entry, R [E, D] the router's rows (arXiv 2506.14038). Sees no token.

    0 for orthonormal rows, E for rows of zeros, E^2 - E where all rows are one unit vector. orthogonal: start from
    the drawn rows made orthonormal, by Gram and Schmidt's rule (the paper starts orthogonal; that this is how, and
    the weight of the loss, are our choice).
    """

    of_weights = True

    def __init__(self, *, weight: Schedule = constant(0.01), orthogonal: bool = True):
        self.weight, self.orthogonal = weight, orthogonal

    def start(self, moe: MoE) -> dict[str, Tensor]:
        if self.orthogonal:
            rows_ED = router_rows(moe)
            with torch.no_grad():
                q_DE, r_EE = torch.linalg.qr(rows_ED.T)
                backwards_E = r_EE.diagonal() < 0  # qr may turn a direction round
                rows_ED.copy_(torch.where(backwards_E, -q_DE, q_DE).T)
        return {}

    def loss(self, routing: Routing, layer: Layer = Layer()) -> Tensor:
        rows_ED = router_rows(layer.moe)
        eye_EE = torch.eye(len(rows_ED), dtype=rows_ED.dtype, device=rows_ED.device)
        return (rows_ED @ rows_ED.T - eye_EE).abs().sum()

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        (E, _), dim = routed(cfg), cfg["model"]["dim"]
        if node["orthogonal"] and dim < E:
            return [f"balance.simbal.orthogonal: {E} rows of model.dim={dim} cannot be; orthogonal=false can"]
        return without_rows("simbal", cfg)
