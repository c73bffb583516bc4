"""Switch Transformer: the most probable expert alone, scaled by its probability."""

from typing import Any

from moe_lab.config import option
from moe_lab.routers.gated import Gated
from moe_lab.routing import Choices


@option("router", "switch")
class Switch(Gated):
    """The k chosen outputs are multiplied by their probabilities, which is where the router's gradient comes from.

    k=1 is Switch (arXiv 2101.03961). With explore=[gumbel] and a temperature it is the compact recipe: noise, softmax
    over temperature, hard top-k, times probability.
    """

    def __init__(self, dim: int, num_experts: int, *, k: Choices = 1, **common: Any):
        super().__init__(dim, num_experts, k=k, **common)
