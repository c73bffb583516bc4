"""Softmax over all experts, then the k most probable."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.routing import Plan, Router

Noise = Literal["none", "gaussian", "gumbel"]


class NoisyLogits(Router):
    """A router whose logits may carry noise of a fixed standard deviation."""

    def __init__(self, dim: int, num_experts: int, *, k: int, noise: Noise, noise_std: float):
        super().__init__(dim, num_experts, k=k)
        self.noise = noise
        self.std = noise_std

    def noise_std(self, x_TD: Tensor) -> Tensor:
        return x_TD.new_full((), self.std)


@option("router", "topk")
class TopK(NoisyLogits):
    """Gate weights are the probabilities of the chosen experts, renormalised to sum to one or as they are.

    With k=1 and renormalise=true the weight is always 1 and the router gets no task gradient (verdict: frozen).
    Sources: OLMoE (arXiv 2409.02060) does not renormalise, Mixtral (arXiv 2401.04088) does.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Annotated[int, Field(ge=1)] = 2,
        renormalise: bool = True,
        noise: Noise = "none",
        noise_std: Annotated[float, Field(ge=0)] = 1.0,
    ):
        super().__init__(dim, num_experts, k=k, noise=noise, noise_std=noise_std)
        self.renormalise = renormalise

    def choose(self, rank_TE: Tensor, gates_TE: Tensor) -> Plan:
        return self.top_k(rank_TE, gates_TE, self.renormalise)
