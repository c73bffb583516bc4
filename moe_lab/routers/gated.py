"""What the score-based routers that weight by a gate have in common: gate function, order, renormalising.

Together these decide which router rows a token's task gradient reaches (arXiv 2605.12476 turns on it): a softmax over
all experts sends it to every row through its denominator, a gate among the chosen experts only to theirs.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from moe_lab.routing import Context, Plan, Scored, Traits
from moe_lab.scores import softmax

Gate = Literal["softmax", "sigmoid", "normalised_sigmoid"]
Order = Literal["gate_first", "topk_first"]


class Weighed(Scored):
    """Each chosen expert is weighed by its gate value.

    softmax: over experts. sigmoid: of each score by itself. normalised_sigmoid: sigmoids over their sum.
    """

    def __init__(self, dim: int, num_experts: int, *, gate: Gate = "softmax", **common: Any):
        super().__init__(dim, num_experts, **common)
        self.function = gate

    def gate(self, logits_TE: Tensor) -> Tensor:
        if self.function == "softmax":
            return softmax(logits_TE)
        return logits_TE.sigmoid() if self.function == "sigmoid" else _shares_of_sigmoids(logits_TE)

    def distribution(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        return _shares_of_sigmoids(logits_TE) if self.function == "sigmoid" else gates_TE

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        apart = node["gate"] == "sigmoid"  # any other gate of one expert alone is 1
        rows = "selected" if apart else "none" if E == 1 else "all"
        return replace(super().traits(node, E), live=apart or E > 1, rows=rows)


class Gated(Weighed):
    """The k best experts, each weighted by its gate value, over all experts or over the chosen.

    gate_first takes the gate over all experts and then chooses, topk_first chooses and then takes it over the chosen;
    renormalise divides the chosen weights by their sum. What is equal, and which rows get a gradient:

    - the same, rows of the chosen: softmax topk_first, softmax renormalised
    - the same, rows of the chosen: normalised_sigmoid topk_first or renormalised, sigmoid renormalised
    - the same, rows of the chosen: sigmoid in either order
    - all rows: softmax or normalised_sigmoid gate_first, not renormalised

    With k=1 the first two always weigh 1, and the router gets no task gradient (verdict: frozen).
    Where a bias chose experts whose gate values sum to less than 1e-20, weights among the chosen fade to 0.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        gate: Gate = "softmax",
        order: Order = "gate_first",
        renormalise: bool = False,
        **common: Any,
    ):
        super().__init__(dim, num_experts, gate=gate, **common)
        self.among_chosen = _among_chosen(gate, order, renormalise)

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        # A softmax over the chosen scores is the softmax over all of them, renormalised; so for the sigmoids' shares.
        return self.top_k(rank_TE, gates_TE, self.among_chosen)

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        found = super().traits(node, E)
        if not _among_chosen(node["gate"], node["order"], node["renormalise"]):
            return found
        alone = node["k"] == 1
        return replace(found, live=not alone, rows="none" if alone else "selected")


def _among_chosen(gate: Gate, order: Order, renormalise: bool) -> bool:
    """Whether the chosen experts' weights sum to one."""
    return renormalise or (order == "topk_first" and gate != "sigmoid")


def _shares_of_sigmoids(logits_TE: Tensor) -> Tensor:
    """sigmoid(z) over its row sum, through logarithms: stays a distribution where every sigmoid underflows."""
    return softmax(F.logsigmoid(logits_TE))
