"""Auxiliary-loss-free balancing: a bias on the choice, moved against the load after each update."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.config import option, registered
from moe_lab.routing import Routing


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

    def statistics(self, routing: Routing, layer: Layer) -> dict[str, Tensor]:
        return {"selected_E": routing.plan.selected_E}

    def after_step(self, layer: Layer, stats: Mapping[str, Tensor], rate: float, progress: float) -> None:
        assert layer.moe is not None
        load_E = stats["selected_E"]
        mean = load_E.float().mean()
        error_E = mean - load_E
        step_E = error_E.sign() if self.update == "sign" else error_E / mean
        layer.moe.bias_E += self.rate * rate * step_E

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        router = cfg["router"]
        kind = registered("router")[router["name"]]
        if kind.every_expert or not kind.scored:
            return [f"balance.loss_free: router={router['name']} makes no choice by scores that a bias could move"]
        return []
