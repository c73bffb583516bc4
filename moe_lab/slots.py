"""Soft MoE's plan: experts run on slots, each a mixture of tokens, and every token reads all slots of its set.

Shapes: T tokens in B sequences of S, D width, E experts, P slots per set (those of expert 0 first), N rows, K chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.counting import count_by_group
from moe_lab.plans import Assignments, cached, hardened

CHUNK = 32  # tokens whose running sums are taken by one product
Mix = Callable[[Tensor, Tensor], Tensor]  # x [B, S, D], logits [B, S, P] -> slots [B, sets, P, D]


@dataclass(frozen=True)
class Slots:
    """Each `readers` tokens of a sequence, one behind the other, read a set of P slots of their own.

    combine_TP: weights of the slots, fp32, gradients intact. mix: makes the sets of slots from tokens and logits_TP.
    selected_TK: what counts as the router's choice, strongest first.
    """

    logits_TP: Tensor
    combine_TP: Tensor
    selected_TK: Tensor
    num_experts: int
    seq_len: int
    readers: int
    mix: Mix
    kept_TK: None = None
    ragged = False

    @property
    def _sets(self) -> int:
        """Sets of slots per sequence; the last may have fewer readers."""
        return -(-self.seq_len // self.readers)

    @cached
    def counts_E(self) -> Tensor:
        (T, P), E = self.combine_TP.shape, self.num_experts
        rows = T // self.seq_len * self._sets * P // E
        return torch.full((E,), rows, dtype=torch.int64, device=self.combine_TP.device)

    @cached
    def selected_E(self) -> Tensor:
        return self.selected(1)[0]

    @property
    def kept_E(self) -> Tensor:
        return self.selected_E

    @cached
    def _mass_TE(self) -> Tensor:
        return self.combine_TP.unflatten(1, (self.num_experts, -1)).sum(-1)

    def selected(self, groups: int) -> Tensor:
        return count_by_group(self.selected_TK, self.num_experts, groups)

    def mass(self, groups: int) -> Tensor:
        return self._mass_TE.view(groups, -1, self.num_experts).sum(1)

    def importance_E(self) -> Tensor:
        return self._mass_TE.sum(0)

    def gather(self, x_TD: Tensor) -> Tensor:
        """x [T, D] -> rows [N, D] sorted by expert: the sets of all sequences, one behind the other."""
        x_BSD, logits_BSP = (t.unflatten(0, (-1, self.seq_len)) for t in (x_TD, self.logits_TP))
        slots_GPD = self.mix(x_BSD, logits_BSP).flatten(0, 1)
        return slots_GPD.unflatten(1, (self.num_experts, -1)).transpose(0, 1).flatten(0, 2)

    def combine(self, rows_ND: Tensor) -> Tensor:
        E, S, P = self.num_experts, self.seq_len, self.combine_TP.shape[1]
        out_GPD = rows_ND.unflatten(0, (E, -1, P // E)).transpose(0, 1).flatten(1, 2)
        weight_BSP = self.combine_TP.to(rows_ND.dtype).unflatten(0, (-1, S))
        weight_BSP = F.pad(weight_BSP, (0, 0, 0, self._sets * self.readers - S))
        y_GRD = weight_BSP.reshape(-1, self.readers, P) @ out_GPD
        return y_GRD.view(len(weight_BSP), -1, rows_ND.shape[1])[:, :S].flatten(0, 1)

    def harden(self, k: int) -> Assignments:
        """The k strongest experts of each token on the token itself: no slots, nothing of other tokens."""
        expert_TK = self.selected_TK[:, :k]
        return hardened(expert_TK, self._mass_TE.gather(1, expert_TK), self._mass_TE, self.num_experts)


def whole(x_BSD: Tensor, logits_BSP: Tensor) -> Tensor:
    """One set per sequence, made of all its tokens, [B, 1, P, D]."""
    return _mixed(x_BSD[:, None], logits_BSP[:, None])


def before(block: int) -> Mix:
    """A set per block of tokens, made of the block before it, [B, blocks, P, D].

    The first block's is the first token in every slot, without a gradient: any mean of the block would tell its
    tokens of later ones.
    """

    def mix(x_BSD: Tensor, logits_BSP: Tensor) -> Tensor:
        (B, S, P), D = logits_BSP.shape, x_BSD.shape[2]
        sources = (S - 1) // block  # the last block, whole or not, is no other's
        first_BPD = x_BSD[:, :1].detach().expand(B, P, D)[:, None]
        x_BnMD, logits_BnMP = (t[:, : sources * block].unflatten(1, (sources, block)) for t in (x_BSD, logits_BSP))
        return torch.cat([first_BPD, _mixed(x_BnMD, logits_BnMP)], 1)

    return mix


def _mixed(x_BnMD: Tensor, logits_BnMP: Tensor) -> Tensor:
    """Each slot's mean of M tokens, weighted by the softmax of its logits over them."""
    return logits_BnMP.softmax(2).to(x_BnMD.dtype).transpose(2, 3) @ x_BnMD


def running(x_BSD: Tensor, logits_BSP: Tensor) -> Tensor:
    """A set per token, made of it and all before it, [B, S, P, D]: the softmax over i <= t by running sums.

    Sums of exp(logit - m) and of its products with x, where m is the largest logit so far, so that nothing overflows;
    sums carried over from a chunk are scaled to the new m. Both are in the logits' dtype.
    """
    top_BSP = logits_BSP.detach().cummax(1).values
    found, carried = [], None
    for x, logits, top in zip(*(t.split(CHUNK, 1) for t in (x_BSD, logits_BSP, top_BSP)), strict=True):
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        power_BtiP = (logits[:, None] - top[:, :, None]).masked_fill(later[..., None], -torch.inf).exp()
        sum_BtP = power_BtiP.sum(2)
        sum_BtPD = torch.einsum("btip,bid->btpd", power_BtiP, x.to(logits.dtype))
        if carried is not None:
            fade_BtP = (carried[0] - top).exp()
            sum_BtP = sum_BtP + fade_BtP * carried[1]
            sum_BtPD = sum_BtPD + fade_BtP[..., None] * carried[2]
        found.append((sum_BtPD / sum_BtP[..., None]).to(x.dtype))
        carried = [t[:, -1:] for t in (top, sum_BtP, sum_BtPD)]
    return torch.cat(found, 1)
