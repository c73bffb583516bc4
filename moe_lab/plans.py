"""Plans: how rows move to the experts and back. The experts know nothing else of routing.

Shapes: T tokens, D width, E experts, K chosen per token, N rows handed to the experts.

Three things are kept apart: *selected* (the router's choice), *kept* (after capacity) and *executed* (rows that were
computed).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moe_lab.counting import count, count_by_group, sort, sum_by_group

R = TypeVar("R")
Drop = Literal["position", "probability"]  # who keeps a place in a full expert: the first, or the heaviest


class cached(Generic[R]):
    """A property that is computed once, at its first use.

    functools has the same, but takes a lock before Python 3.12, where torch.compile would cut its graph.
    """

    def __init__(self, compute: Callable[[Any], R]):
        self.compute, self.name = compute, compute.__name__

    def __get__(self, plan: Any, owner: type) -> R:
        value = plan.__dict__[self.name] = self.compute(plan)  # found there from now on, before this is asked
        return value


class _Permute(Function):
    """x [T, D] -> rows [T*K, D] in expert order; backward gathers by the inverse and sums over K (no index_put)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, inverse_N: Tensor, kept_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse_N, kept_N)
        ctx.K = token_N.numel() // x_TD.shape[0]
        return x_TD.index_select(0, token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        inverse_N, kept_N = ctx.saved_tensors
        return _per_token(grad_ND, inverse_N, kept_N, ctx.K), None, None, None


class _Combine(Function):
    """rows [T*K, D] in expert order, weights [T, K] -> y [T, D]; backward hands the experts a contiguous gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weight_TK: Tensor,
        order_N: Tensor,
        token_N: Tensor,
        inverse_N: Tensor,
        kept_N: Tensor | None,
    ) -> Tensor:
        weight_N = weight_TK.reshape(-1).index_select(0, order_N).to(rows_ND.dtype)
        ctx.save_for_backward(rows_ND, weight_N, token_N, inverse_N, kept_N)
        ctx.weights = weight_TK.shape, weight_TK.dtype
        return _per_token(rows_ND * weight_N[:, None], inverse_N, kept_N, weight_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_ND, weight_N, token_N, inverse_N, kept_N = ctx.saved_tensors
        shape, dtype = ctx.weights
        grad_ND = grad_TD.index_select(0, token_N)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # not where the weight is a constant
            grad_weight = torch.linalg.vecdot(grad_ND, rows_ND).index_select(0, inverse_N)
            if kept_N is not None:
                grad_weight = grad_weight.masked_fill(~kept_N, 0)
            grad_weight = grad_weight.view(shape).to(dtype)
        return grad_ND.mul_(weight_N[:, None]), grad_weight, None, None, None, None


def _per_token(rows_ND: Tensor, inverse_N: Tensor, kept_N: Tensor | None, K: int) -> Tensor:
    """Rows in expert order -> their sum over each token's K rows [T, D]; rows that no expert computed count as 0."""
    rows_ND = rows_ND.index_select(0, inverse_N)
    if kept_N is not None:
        rows_ND = rows_ND.masked_fill(~kept_N[:, None], 0)
    if K == 1:
        return rows_ND
    rows_TKD = rows_ND.view(-1, K, rows_ND.shape[1])
    # A reduction over two is several times slower than a sum on a CPU.
    return rows_TKD[:, 0] + rows_TKD[:, 1] if K == 2 else rows_TKD.sum(1)


@dataclass(frozen=True)
class Assignments:
    """Each token goes to up to K experts. Rows are sorted by expert once; those of no expert stand behind the last's.

    expert_TK: chosen experts, int64, strongest first. weight_TK: combine weights, fp32, gradients intact.
    kept_TK: False where capacity dropped the assignment (the token keeps its residual), None when nothing can drop.
    chosen_TK: False where a token has fewer than K choices and this is none; None when each has K.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    num_experts: int
    kept_TK: Tensor | None = None
    chosen_TK: Tensor | None = None

    @property
    def ragged(self) -> bool:
        """Whether selected_TK holds `num_experts` where a token has no further choice."""
        return self.chosen_TK is not None

    @cached
    def selected_TK(self) -> Tensor:
        """The chosen experts, `num_experts` where there is no choice."""
        if self.chosen_TK is None:
            return self.expert_TK
        return torch.where(self.chosen_TK, self.expert_TK, self.num_experts)

    @cached
    def executed_TK(self) -> Tensor | None:
        """Which assignments are computed: chosen and kept; None: all."""
        if self.kept_TK is None or self.chosen_TK is None:
            return self.chosen_TK if self.kept_TK is None else self.kept_TK
        return self.kept_TK & self.chosen_TK

    @cached
    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows by expert, the inverse of that order, and rows per expert that are executed."""
        key_N = self.expert_TK.reshape(-1)
        if self.executed_TK is not None:
            key_N = torch.where(self.executed_TK.reshape(-1), key_N, self.num_experts)
        order_N, inverse_N, counts_X = sort(key_N, self.num_experts + 1)
        return order_N, inverse_N, counts_X[: self.num_experts]

    @property
    def counts_E(self) -> Tensor:
        """Rows handed to each expert, int64 [E]."""
        return self._order[2]

    @cached
    def selected_E(self) -> Tensor:
        """Tokens that chose each expert, before capacity, int64 [E]."""
        return self.counts_E if self.kept_TK is None else self.selected(1)[0]

    def selected(self, groups: int) -> Tensor:
        """The same for each of `groups` equal stretches of tokens, [G, E]."""
        return count_by_group(self.selected_TK, self.num_experts, groups)

    def mass(self, groups: int) -> Tensor:
        """Combine weight given to each expert before capacity, summed by stretch, fp32 [G, E], with gradients."""
        weight_TK = self.weight_TK
        if self.chosen_TK is not None:
            weight_TK = weight_TK.masked_fill(~self.chosen_TK, 0)
        return sum_by_group(self.expert_TK, weight_TK, self.num_experts, groups)

    @property
    def kept_E(self) -> Tensor:
        return self.counts_E

    def gather(self, x_TD: Tensor) -> Tensor:
        """x [T, D] -> rows [N, D] sorted by expert."""
        _, inverse_N, _ = self._order
        return _Permute.apply(x_TD, self._token_N, inverse_N, self._kept_N)  # pyright: ignore

    def combine(self, rows_ND: Tensor) -> Tensor:
        """Expert outputs [N, D] -> their weighted sum per token [T, D]."""
        order_N, inverse_N, _ = self._order
        return _Combine.apply(  # pyright: ignore
            rows_ND, self.weight_TK, order_N, self._token_N, inverse_N, self._kept_N
        )

    @cached
    def _token_N(self) -> Tensor:
        """The token of every row."""
        return self._order[0] // self.expert_TK.shape[1]

    @property
    def _kept_N(self) -> Tensor | None:
        return None if self.executed_TK is None else self.executed_TK.reshape(-1)

    def importance_E(self) -> Tensor:
        """Combine weight given to each expert, summed over tokens, before capacity, fp32 [E], gradients intact."""
        return self.mass(1)[0]

    def limit(
        self,
        capacity_factor: Tensor | float,
        k: int | None = None,
        by: Drop = "position",
    ) -> "Assignments":
        """Keep at most ceil(capacity_factor * T * k / E) rows per expert: the first in token order, which looks at no
        later token, or those of the largest combine weight, and of equal ones the first.

        k: choices per token that an even share is counted by (K unless told). Less than a millionth of a row is none:
        every token is dropped and keeps its residual.
        """
        T, K = self.expert_TK.shape
        # 1.1 * 100 / 10 is a hair above 11 in floating point, and would grant a twelfth row.
        factor = (
            capacity_factor
            if isinstance(capacity_factor, Tensor)
            else torch.full((), capacity_factor, dtype=torch.float64)
        )
        share = factor.double() * (T * (k or K) / self.num_experts)
        capacity = (share - 1e-6 * share.clamp_min(1)).ceil()
        _, inverse_N, counts_E = self._order
        if by == "probability":
            inverse_N = self._place_by_weight()
        first_E = counts_E.cumsum(0) - counts_E
        rank_N = inverse_N - first_E[self.expert_TK.reshape(-1)]
        return replace(self, kept_TK=(rank_N < capacity).view(T, K))

    def _place_by_weight(self) -> Tensor:
        """Where each row would stand if an expert's rows were sorted by weight, the largest first, [T * K]."""
        order_N = torch.argsort(self.weight_TK.detach().reshape(-1), descending=True, stable=True)
        order_N = order_N[torch.argsort(self.selected_TK.reshape(-1)[order_N], stable=True)]
        return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))

    def harden(self, k: int) -> "Assignments":
        """Only the k strongest choices of each token, which share the token's whole weight in proportion."""
        weight_TK, chosen_TK = self.weight_TK, self.chosen_TK
        if chosen_TK is not None:
            weight_TK = weight_TK.masked_fill(~chosen_TK, 0)
        hard = hardened(self.expert_TK[:, :k], weight_TK[:, :k], weight_TK, self.num_experts)
        return hard if chosen_TK is None else replace(hard, chosen_TK=chosen_TK[:, :k])


@dataclass(frozen=True)
class Mixture:
    """Every expert runs on every token: E / K times the cost of a choice, and the gradient of the full relaxation.

    weight_TE: combine weights, fp32. selected_TK: what counts as the router's choice, strongest first.
    """

    weight_TE: Tensor
    selected_TK: Tensor
    kept_TK: None = None
    ragged = False

    @property
    def num_experts(self) -> int:
        return self.weight_TE.shape[1]

    @cached
    def counts_E(self) -> Tensor:
        T, E = self.weight_TE.shape
        return torch.full((E,), T, dtype=torch.int64, device=self.weight_TE.device)

    @cached
    def selected_E(self) -> Tensor:
        return count(self.selected_TK.reshape(-1), self.num_experts)

    @property
    def kept_E(self) -> Tensor:
        return self.selected_E

    def selected(self, groups: int) -> Tensor:
        return count_by_group(self.selected_TK, self.num_experts, groups)

    def mass(self, groups: int) -> Tensor:
        return self.weight_TE.view(groups, -1, self.num_experts).sum(1)

    def gather(self, x_TD: Tensor) -> Tensor:
        return x_TD.repeat(self.num_experts, 1)

    def combine(self, rows_ND: Tensor) -> Tensor:
        T, E = self.weight_TE.shape
        return torch.einsum("etd,te->td", rows_ND.view(E, T, -1), self.weight_TE.to(rows_ND.dtype))

    def importance_E(self) -> Tensor:
        return self.weight_TE.sum(0)

    def harden(self, k: int) -> Assignments:
        expert_TK = self.selected_TK[:, :k]
        return hardened(expert_TK, self.weight_TE.gather(1, expert_TK), self.weight_TE, self.num_experts)


def hardened(expert_TK: Tensor, weight_TK: Tensor, all_TX: Tensor, num_experts: int) -> Assignments:
    return Assignments(expert_TK, shares(weight_TK) * all_TX.sum(-1, keepdim=True), num_experts)


def shares(weight_TK: Tensor) -> Tensor:
    """Weights over their row sum; rows below 1e-20 (sigmoids of logits under -46) fade to 0, not to 0 / 0."""
    return weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-20)


def best(rank_TE: Tensor, k: int) -> Tensor:
    """The k experts that rank highest for each token, best first, int64 [T, k]."""
    return rank_TE.max(-1, keepdim=True).indices if k == 1 else rank_TE.topk(k, -1).indices
