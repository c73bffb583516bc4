"""DeepSeek-V3 routing: independent sigmoid scores, the k largest, weights normalised among the chosen."""

from typing import Any

from moe_lab.config import option
from moe_lab.routers.gated import Gate, Gated
from moe_lab.routing import Choices


@option("router", "sigmoid_topk")
class SigmoidTopK(Gated):
    """Scores are sigmoids; a selection bias (balance=[loss_free]) moves the choice and never the weight.

    Sources: DeepSeek-V3 (arXiv 2412.19437 section 2.1.2); renormalise=false is the gate of arXiv 2408.15664.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 2,
        gate: Gate = "sigmoid",
        renormalise: bool = True,
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, gate=gate, renormalise=renormalise, **common)
