"""ReMoE's adaptive L1 penalty: as strong as it takes for ReLU gates to leave k experts per token."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.config import option
from moe_lab.model.moe import MoE
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant

Positive = Annotated[float, Field(gt=0)]
LIMITS = 1e-30, 1e30


@option("balance", "l1_adaptive")
class L1Adaptive(Balancer):
    """lambda * sum_e f_e mean_t R_te, R the gate values, f_e = E/(kT) * tokens of e, or 1 (arXiv 2412.14711).

    After each update lambda <- lambda * alpha^sign((1 - k/E) - S), S the share of zero gates over all layers, as in
    the paper: one lambda for the model, so that layers may differ in how many experts they use. No gradient through
    f. Worth lambda * E * R if all gates are R, with f as well at k = E; 0 where no gate is open. Ours: lambda stands
    still while the weight is 0, and stays within LIMITS, where it can neither overflow nor be 0 for good.
    """

    steers = True

    def __init__(
        self,
        *,
        weight: Schedule = constant(1.0),
        start: Positive = 1e-8,
        alpha: Annotated[float, Field(gt=1)] = 1.2,
        load: bool = True,
    ):
        self.weight, self.first, self.alpha, self.load = weight, start, alpha, load

    def start(self, moe: MoE) -> dict[str, Tensor]:
        return {"strength": torch.full((), self.first, device=moe.bias_E.device)}

    def loss(self, routing: Routing, layer: Layer = Layer()) -> Tensor:
        plan, T = routing.plan, routing.logits_TE.shape[0]
        k = layer.moe.router.k if layer.moe else plan.selected_TK.shape[1]
        mean_E = plan.importance_E() / T
        if self.load:
            mean_E = mean_E * (plan.num_experts / (k * T) * plan.selected_E)
        return mean_E.sum() * layer.state.get("strength", self.first)

    def statistics(self, routing: Routing, layer: Layer) -> dict[str, Tensor]:
        selected_E = routing.plan.selected_E
        return {"open": selected_E.sum(), "gates": torch.full_like(selected_E[0], routing.logits_TE.numel())}

    def after_update(
        self, layers: Sequence[Layer], stats: Sequence[Mapping[str, Tensor]], rate: float, progress: float
    ) -> None:
        if not layers:
            return
        moe = layers[0].moe
        assert moe is not None
        opened, gates = (torch.stack([s[name] for s in stats]).sum() for name in ("open", "gates"))
        target = moe.router.k / moe.experts.num
        factor = self.alpha ** torch.sign(opened / gates - target)
        for layer in layers:
            layer.state["strength"] = (layer.state["strength"] * factor).clamp(*LIMITS)

    def held(self, layer: Layer) -> dict[str, Tensor]:
        return {"l1_lambda": layer.state["strength"]}

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        router = cfg["router"]["name"]
        if router != "relu":
            return [f"balance.l1_adaptive: router={router} opens no gates that a penalty could close; take router=relu"]
        return []
