"""Over which tokens a load loss takes its means: a sequence, a micro-batch, the update so far, or a running mean.

The smaller the scope, the more alike every piece of text must be spread over the experts (arXiv 2501.11873).
Shapes: T tokens, E experts, G groups (consecutive stretches of tokens, or one of all), N tables.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.model.moe import MoE
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant

TINY = 1e-30  # of a mean probability: below it logarithms stand still, so that their gradients stay finite
Scope = Literal["sequence", "micro_batch", "global_batch", "running"]


class LoadLoss(Balancer):
    """A loss of means over tokens. A subclass writes `sums` over tokens and the loss `of_means`.

    scope=sequence: of each sequence's means, then averaged. micro_batch: of the micro-batch's.
    global_batch: the value is that of the mean over the micro-batches of this update so far, the gradient that of this
    one's mean at this value; without accumulation the same as micro_batch.
    running: the same, with a mean over updates that forgets: decay * (that of earlier ones) + (1 - decay) * (this
    micro-batch's), over the sum of these weights, so that the start has no pull. How both differentiate is our choice.
    """

    tables = 1  # how many `sums` returns

    def __init__(
        self,
        *,
        weight: Schedule = constant(0.01),
        scope: Scope = "micro_batch",
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        **rest: Any,
    ):
        self.weight, self.scope, self.decay = weight, scope, decay

    @classmethod
    def spreads(cls, node: Mapping[str, Any]) -> bool:
        return True

    def sums(self, routing: Routing, groups: int) -> tuple[Tensor, ...]:
        """Tables [G, E] of sums over the tokens of each of `groups` stretches."""
        raise NotImplementedError

    def of_means(self, *means_GE: Tensor) -> Tensor:
        """The loss [G] of such sums over their number of tokens."""
        raise NotImplementedError

    def loss(self, routing: Routing, layer: Layer = Layer()) -> Tensor:
        T, dtype, groups = routing.probs_TE.shape[0], routing.probs_TE.dtype, 1
        if self.scope == "sequence":
            assert layer.seq_len is not None
            groups = T // layer.seq_len
        means = [table_GE.to(dtype) / (T / groups) for table_GE in self.sums(routing, groups)]
        if self.scope == "global_batch" and layer.earlier:
            tokens = layer.earlier["tokens"]
            means = _with_past(means, layer.earlier["sums_NE"] / tokens, T / (tokens + T))
        elif self.scope == "running" and layer.state:
            means = _with_past(means, layer.state["mean_NE"], self._share(layer.state["weight"]))
        losses_G = self.of_means(*means)
        return losses_G.squeeze(0) if groups == 1 else losses_G.mean()

    def start(self, moe: MoE) -> dict[str, Tensor]:
        if self.scope != "running":
            return {}
        nothing = moe.bias_E.new_zeros(self.tables, moe.experts.num)
        return {"mean_NE": nothing, "weight": nothing.new_zeros(())}

    def statistics(self, routing: Routing, layer: Layer) -> dict[str, Tensor]:
        if self.scope not in ("global_batch", "running"):
            return {}
        T = routing.probs_TE.shape[0]
        sums_NE = torch.cat([table_GE.to(routing.probs_TE.dtype) for table_GE in self.sums(routing, 1)]).detach()
        return {"sums_NE": sums_NE, "tokens": sums_NE.new_full((), T)}

    def after_step(self, layer: Layer, stats: Mapping[str, Tensor], rate: float, progress: float) -> None:
        if self.scope != "running":
            return
        mean_NE, weight = layer.state["mean_NE"], layer.state["weight"]
        layer.state["mean_NE"] = mean_NE.lerp(stats["sums_NE"] / stats["tokens"], self._share(weight))
        layer.state["weight"] = self.decay * weight + 1 - self.decay

    def _share(self, weight: Tensor) -> Tensor:
        """Of the newest mean in the running one; the earlier ones weigh so much together."""
        return (1 - self.decay) / (self.decay * weight + 1 - self.decay)


def over_groups(table_TE: Tensor, groups: int) -> Tensor:
    """The sums of consecutive stretches of tokens, [G, E]."""
    return table_TE.view(groups, -1, table_TE.shape[1]).sum(1)


def chosen(routing: Routing, groups: int) -> Tensor:
    """How many tokens of each stretch chose each expert, [G, E]; of all tokens the plan has counted already."""
    return routing.plan.selected_E[None] if groups == 1 else routing.plan.selected(groups)


def _with_past(means: list[Tensor], past_NE: Tensor, share: Tensor) -> list[Tensor]:
    """The value of share * mean + (1 - share) * past with the gradient of the mean."""
    return [
        mean_GE + ((1 - share) * (past_E - mean_GE)).detach() for mean_GE, past_E in zip(means, past_NE, strict=True)
    ]
