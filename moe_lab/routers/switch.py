"""Switch Transformer: the most probable expert alone, scaled by its probability."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.routers.topk import Noise, NoisyLogits
from moe_lab.routing import Plan


@option("router", "switch")
class Switch(NoisyLogits):
    """The k chosen outputs are multiplied by their probabilities, which is where the router's gradient comes from.

    k=1 is Switch (arXiv 2101.03961). With noise=gumbel and a temperature it is the compact recipe: noise, softmax
    over temperature, hard top-k, times probability.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Annotated[int, Field(ge=1)] = 1,
        noise: Noise = "none",
        noise_std: Annotated[float, Field(ge=0)] = 1.0,
    ):
        super().__init__(dim, num_experts, k=k, noise=noise, noise_std=noise_std)

    def choose(self, rank_TE: Tensor, gates_TE: Tensor) -> Plan:
        return self.top_k(rank_TE, gates_TE)
