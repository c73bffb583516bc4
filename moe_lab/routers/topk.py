"""Softmax over all experts, then the k most probable."""

from typing import Any

from moe_lab.config import option
from moe_lab.routers.gated import Gated
from moe_lab.routing import Choices


@option("router", "topk")
class TopK(Gated):
    """Gate weights are the probabilities of the chosen experts, renormalised to sum to one or as they are.

    With k=1 and renormalise=true the weight is always 1 and the router gets no task gradient (verdict: frozen).
    Sources: OLMoE (arXiv 2409.02060) does not renormalise, Mixtral (arXiv 2401.04088) does; order=topk_first is how
    GPT-OSS and JetMoE write the latter.
    """

    def __init__(self, dim: int, num_experts: int, *, k: Choices = 2, renormalise: bool = True, **common: Any):
        super().__init__(dim, num_experts, k=k, renormalise=renormalise, **common)
