"""Auxiliary-loss-free balancing: a bias on the choice, moved against the load after each update."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from moe_lab.balance.base import Balancer
from moe_lab.config import option, registered


@option("balance", "loss_free")
class LossFree(Balancer):
    """b_i += rate * sign(mean load - load_i), or rate * (1 - load_i / mean load) (arXiv 2408.15664, algorithm 1).

    The bias enters the choice and never the weight. 0.001 suits tens of thousands of steps; runs of a few thousand
    need more.
    """

    moves_bias = True

    def __init__(
        self, *, rate: Annotated[float, Field(ge=0)] = 0.005, update: Literal["sign", "proportional"] = "sign"
    ):
        self.rate, self.update = rate, update

    def after_step(self, bias_E: Tensor, selected_E: Tensor, rate: float) -> None:
        mean = selected_E.float().mean()
        error_E = mean - selected_E
        step_E = error_E.sign() if self.update == "sign" else error_E / mean
        bias_E += self.rate * rate * step_E

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        router = cfg["router"]
        if registered("router")[router["name"]].every_expert:
            return [f"balance.loss_free: router={router['name']} runs every expert, so there is no choice to bias"]
        return []
