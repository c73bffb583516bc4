"""DeepSeek-V3 routing: independent sigmoid scores, the k largest, weights normalised among the chosen."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.routers.topk import Noise, NoisyLogits
from moe_lab.routing import Plan


@option("router", "sigmoid_topk")
class SigmoidTopK(NoisyLogits):
    """Scores are sigmoids; a selection bias (balance=[loss_free]) moves the choice and never the weight.

    Sources: DeepSeek-V3 (arXiv 2412.19437 section 2.1.2); renormalise=false is the gate of arXiv 2408.15664.
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

    def gate(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()

    def distribution(self, logits_TE: Tensor) -> Tensor:
        # sigmoid(z) over its row sum, through logarithms: stays a distribution where every sigmoid underflows.
        return F.logsigmoid(logits_TE).softmax(-1)

    def choose(self, rank_TE: Tensor, gates_TE: Tensor) -> Plan:
        return self.top_k(rank_TE, gates_TE, self.renormalise)
