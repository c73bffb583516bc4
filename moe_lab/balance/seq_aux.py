"""DeepSeek-V3's complementary loss within each sequence."""

import torch.nn.functional as F
from torch import Tensor

from moe_lab.balance.switch import Switch
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "seq_aux")
class SeqAux(Switch):
    """sum_i f_i P_i of each sequence, then their mean (arXiv 2412.19437, eq. 17-20): f_i = E / (k S) times the
    sequence's tokens that chose i (no gradient; a selection bias has its say), P the mean of sigmoid scores over
    their row sum. 1 where every sequence is balanced, E/k where each of them goes to k experts.

    The scores are those of the clean logits at temperature 1, whatever gate the router has.
    """

    def __init__(self, *, weight: Schedule = constant(0.0001)):
        super().__init__(weight=weight, scope="sequence")

    def scores(self, routing: Routing) -> Tensor:
        # sigmoid(z) over its row sum, through logarithms: stays a distribution where every sigmoid underflows.
        return F.logsigmoid(routing.logits_TE).softmax(-1)
