"""The plan of expert choice: every expert takes the same number of tokens.

Shapes: T tokens, D width, E experts, C tokens per expert, N = E * C rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_lab.plans import Assignments, cached, hardened, shares


@dataclass(frozen=True)
class Rows:
    """Every expert takes the same number of tokens; a token may have any number of experts (expert choice).

    token_EC: the tokens of each expert, int64. weight_EC: their combine weights, fp32, gradients intact. tokens: T.
    """

    token_EC: Tensor
    weight_EC: Tensor
    tokens: int
    kept_TK: None = None
    ragged = True

    @property
    def num_experts(self) -> int:
        return self.token_EC.shape[0]

    @cached
    def counts_E(self) -> Tensor:
        E, C = self.token_EC.shape
        return torch.full((E,), C, dtype=torch.int64, device=self.token_EC.device)

    @property
    def selected_E(self) -> Tensor:
        return self.counts_E

    @property
    def kept_E(self) -> Tensor:
        return self.counts_E

    @cached
    def _weight_TE(self) -> Tensor:
        """Combine weights as a matrix, 0 where an expert did not take the token."""
        weight_ET = self.weight_EC.new_zeros(self.num_experts, self.tokens)
        return weight_ET.scatter(1, self.token_EC, self.weight_EC).T

    @cached
    def _taken_TE(self) -> Tensor:
        taken_ET = torch.zeros(self.num_experts, self.tokens, dtype=torch.bool, device=self.token_EC.device)
        return taken_ET.scatter(1, self.token_EC, True).T

    @cached
    def selected_TK(self) -> Tensor:
        """Each token's experts, strongest first, `num_experts` where there are no more, [T, E]."""
        strength_TE = torch.where(self._taken_TE, self._weight_TE.detach(), -1.0)
        order_TE = torch.argsort(-strength_TE, dim=-1, stable=True)
        return torch.where(self._taken_TE.gather(1, order_TE), order_TE, self.num_experts)

    def selected(self, groups: int) -> Tensor:
        return self._taken_TE.view(groups, -1, self.num_experts).sum(1)

    def mass(self, groups: int) -> Tensor:
        return self._weight_TE.reshape(groups, -1, self.num_experts).sum(1)

    def importance_E(self) -> Tensor:
        return self.weight_EC.sum(1)

    def gather(self, x_TD: Tensor) -> Tensor:
        return x_TD.index_select(0, self.token_EC.reshape(-1))

    def combine(self, rows_ND: Tensor) -> Tensor:
        weighted_ND = rows_ND * self.weight_EC.reshape(-1, 1).to(rows_ND.dtype)
        y_TD = rows_ND.new_zeros(self.tokens, rows_ND.shape[1])
        return y_TD.index_add(0, self.token_EC.reshape(-1), weighted_ND)

    def renormalised(self) -> "Rows":
        """The weights of each token over their sum."""
        return replace(self, weight_EC=shares(self._weight_TE).T.gather(1, self.token_EC))

    def harden(self, k: int) -> Assignments:
        """Each token's k strongest experts among those that took it."""
        expert_TK = self.selected_TK[:, :k]
        chosen_TK = expert_TK < self.num_experts
        expert_TK = expert_TK.clamp_max(self.num_experts - 1)
        weight_TK = self._weight_TE.gather(1, expert_TK) * chosen_TK
        return replace(hardened(expert_TK, weight_TK, self._weight_TE, self.num_experts), chosen_TK=chosen_TK)
