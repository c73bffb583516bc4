"""Expert-router coupling: an expert answers its own router row loudest, and the row is answered loudest by it."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.balance.rows import router_rows, without_rows
from moe_lab.config import option
from moe_lab.routing import Draw, Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "erc")
class ERC(Balancer):
    """1/E^2 sum_i sum_{j != i} relu(M_ij - alpha M_ii) + relu(M_ji - alpha M_ii), M_ij = ||W_j R~_i|| how strongly
    the input side of expert j (of gated experts the gate, before its activation) answers router row i
    (arXiv 2512.23447). R~ = R * delta, delta ~ U(1 - eps_i, 1 + eps_i) per entry, eps_i half the distance to the
    nearest row over the row's own norm; delta is drawn once per update and layer and is a constant to gradients (ours).

    Sees no token and balances nothing by itself. 0 where each row is answered 1/alpha times louder by its own expert
    than by others, and others' rows are by it; where all rows and experts are alike 2 (1 - 1/E) (1 - alpha) M, which
    is 0 at alpha = 1: there the loss does not see that they are.
    """

    of_weights = True
    draws = {"delta": Draw("uniform", "ED")}

    def __init__(self, *, weight: Schedule = constant(1.0), alpha: Annotated[float, Field(ge=0)] = 1.0):
        self.weight, self.alpha = weight, alpha

    def loss(self, routing: Routing, layer: Layer = Layer()) -> Tensor:
        assert layer.moe is not None
        rows_ED, w_EFD = router_rows(layer.moe), layer.moe.experts.read_in_EFD()
        delta_ED = 1 + reach(rows_ED.detach()) * (2 * layer.draws["delta"] - 1)
        rows_ED = (rows_ED * delta_ED)[: len(w_EFD)]  # experts without a network answer nothing
        answer_EE = torch.einsum("id,jfd->ijf", rows_ED, w_EFD).norm(dim=-1)
        own_E1 = self.alpha * answer_EE.diagonal()[:, None]
        above_EE = (answer_EE - own_E1).relu() + (answer_EE.T - own_E1).relu()
        above_EE = above_EE.masked_fill(torch.eye(len(rows_ED), dtype=torch.bool, device=rows_ED.device), 0)
        return above_EE.sum() / len(rows_ED) ** 2

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        return without_rows("erc", cfg)


def reach(rows_ED: Tensor) -> Tensor:
    """How far each row may be stretched or shrunk and stay nearer to itself than to any other, [E, 1]."""
    apart_EE = torch.cdist(rows_ED, rows_ED, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest_E1 = apart_EE.amin(-1, keepdim=True)
    reach_E1 = nearest_E1 / (2 * rows_ED.norm(dim=-1, keepdim=True)).clamp_min(1e-20)
    return torch.where(nearest_E1.isinf(), 0.0, reach_E1)  # a single row has no other
