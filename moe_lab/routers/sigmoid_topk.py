"""DeepSeek-V3 routing: independent sigmoid scores, the k largest, weights normalised among the chosen."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moe_lab.config import option
from moe_lab.routers.topk import TopK
from moe_lab.routing import Traits


@option("router", "sigmoid_topk")
class SigmoidTopK(TopK):
    """Scores are sigmoids; a selection bias (balance=[loss_free]) moves the choice and never the weight.

    Sources: DeepSeek-V3 (arXiv 2412.19437 section 2.1.2); renormalise=false is the gate of arXiv 2408.15664.
    """

    def gate(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()

    def distribution(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        # sigmoid(z) over its row sum, through logarithms: stays a distribution where every sigmoid underflows.
        return F.logsigmoid(logits_TE).softmax(-1)

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return replace(super().traits(node, E), rows="selected")
