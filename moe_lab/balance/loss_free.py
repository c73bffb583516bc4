"""Auxiliary-loss-free balancing: a bias on the choice, moved against the load after each update."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from moe_lab.balance.base import Layer
from moe_lab.balance.bias import MovesBias
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Fraction, Schedule, constant


@option("balance", "loss_free")
class LossFree(MovesBias):
    """b_i += rate * sign(mean load - load_i), or rate * (1 - load_i / mean load) (arXiv 2408.15664, algorithm 1 and
    its variants; there the proportional rule is the one for softmax gates).

    0.001 suits tens of thousands of steps; runs of a few thousand need more. freeze: the fraction of the run from
    which on the bias stands still (DeepSeek-V3: the last 500B of 14.8T tokens, 0.966). decay, the share of the bias
    that is taken off at each update before the step, and recentre, which takes off its mean after it (no choice
    changes by that), are not in the paper.
    """

    def __init__(
        self,
        *,
        rate: Schedule = constant(0.005),
        update: Literal["sign", "proportional"] = "sign",
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        recentre: bool = False,
        freeze: Fraction | None = None,
    ):
        self.rate, self.update, self.decay, self.recentre, self.freeze = rate, update, decay, recentre, freeze

    def statistics(self, routing: Routing, layer: Layer) -> dict[str, Tensor]:
        return {"selected_E": routing.plan.selected_E}

    def after_step(self, layer: Layer, stats: Mapping[str, Tensor], rate: float, progress: float) -> None:
        if self.freeze is not None and progress >= self.freeze:
            return
        assert layer.moe is not None
        load_E, bias_E = stats["selected_E"], layer.moe.bias_E
        mean = load_E.float().mean()
        error_E = mean - load_E
        step_E = error_E.sign() if self.update == "sign" else error_E / mean
        bias_E *= 1 - self.decay
        bias_E += self.rate.at(progress) * rate * step_E
        if self.recentre:
            bias_E -= bias_E.mean()
