"""Sums over the updates of a window: additive, on the device, without a wait for it.

Shapes: L layers, T tokens of a micro-batch, E experts, K chosen per token, D width, V token classes, P position
classes, C domains.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.observe.confidence import gate_entropy
from moe_lab.observe.dynamics import total_variation
from moe_lab.observe.specialisation import POSITION_CLASSES, TOKEN_CLASSES, n_log_n
from moe_lab.plans import count
from moe_lab.routing import Routing

MEMORY = 0.99  # of the running centroids, per update: half of it is gone after 69 updates


@dataclass(frozen=True)
class View:
    """What observers see of one micro-batch: per MoE layer its Routing and its input [T, D] (detached).

    loss_T: task loss per token, detached. counted_T: False where a token carries no loss (None: all do).
    closes: whether this is the last micro-batch of its update.
    """

    routings: tuple[Routing, ...]
    inputs: tuple[Tensor, ...]
    ids_T: Tensor
    domain_T: Tensor
    seq_len: int
    loss_T: Tensor
    counted_T: Tensor | None = None
    closes: bool = True


@dataclass(frozen=True)
class Sizes:
    """What the sums are sized by; k as the router chooses in training."""

    L: int
    E: int
    k: int
    D: int
    domains: int
    vocab_size: int
    seq_len: int

    @property
    def token_classes(self) -> int:
        return min(self.vocab_size, TOKEN_CLASSES)

    @property
    def position_classes(self) -> int:
        return min(self.seq_len, POSITION_CLASSES)


class Window:
    """`sums` start again with each window; `running` go on: centroids, and the load of the last update."""

    def __init__(self, sizes: Sizes, device: torch.device):
        self.sizes = sizes
        self.tokens = self.sequences = self.updates = 0  # of the window
        L, E = sizes.L, sizes.E

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        counts = {"selected": (L, E), "kept": (L, E), "top1": (L, E), "counted": (L, E)}
        counts |= {"domain": (L, E, sizes.domains), "token": (L, E, sizes.token_classes)}
        counts |= {"position": (L, E, sizes.position_classes)}
        values = {"importance": (L, E), "gate_mass": (L, E), "loss": (L, E)}
        values |= dict.fromkeys(
            ("entropy", "logit_norm", "logsumexp", "flutter", "pairs", "by_sequence", "by_update"), (L,)
        )
        self.sums = {name: zeros(*shape, dtype=torch.int64) for name, shape in counts.items()}
        self.sums |= {name: zeros(*shape, dtype=torch.float64) for name, shape in values.items()}
        # pending: counts of an update that is not complete yet.
        self.running = {"pending": zeros(L, E, dtype=torch.int64)}
        self.running |= {name: zeros(L, E, dtype=torch.float64) for name in ("before", "centroid_count")}
        self.running |= {"centroid_sum": zeros(L, E, sizes.D, dtype=torch.float64)}

    def reset(self) -> None:
        self.tokens = self.sequences = self.updates = 0
        for total in self.sums.values():
            total.zero_()

    @torch.no_grad()
    def add(self, view: View) -> None:
        """Sum up one micro-batch."""
        routings, sums, running = view.routings, self.sums, self.running
        T = routings[0].probs_TE.shape[0]
        selected_LTK = torch.stack([r.plan.selected_TK for r in routings])
        selected_LE = torch.stack([r.plan.selected_E for r in routings])
        logits_LTE = torch.stack([r.logits_TE for r in routings])
        probs_LTE = torch.stack([r.probs_TE for r in routings])
        self.tokens += T
        self.sequences += T // view.seq_len
        sums["selected"] += selected_LE
        sums["kept"] += torch.stack([r.plan.kept_E for r in routings])
        sums["importance"] += probs_LTE.sum(1)
        sums["gate_mass"] += torch.stack([r.plan.importance_E().detach() for r in routings])
        sums["entropy"] += gate_entropy(probs_LTE).sum(1)
        sums["logit_norm"] += logits_LTE.norm(dim=-1).sum(1)
        sums["logsumexp"] += logits_LTE.logsumexp(-1).sum(1)
        self._histograms(view, selected_LTK)
        chosen_LTE = torch.zeros_like(probs_LTE, dtype=torch.float32).scatter_(2, selected_LTK, 1.0)
        self._products(view, chosen_LTE)
        running["pending"] += selected_LE
        if view.closes:
            self._close()

    def _histograms(self, view: View, selected_LTK: Tensor) -> None:
        """Joint counts of chosen expert and domain, token, position."""
        L, T = selected_LTK.shape[:2]
        E, S = self.sizes.E, view.seq_len
        row_LTK = selected_LTK + E * torch.arange(L, device=selected_LTK.device)[:, None, None]
        self.sums["top1"] += count(row_LTK[:, :, 0].flatten(), L * E).view(L, E)
        sequence_T = torch.arange(T, device=selected_LTK.device) // S
        by_sequence_N = (row_LTK * (T // S) + sequence_T[None, :, None]).flatten()
        self.sums["by_sequence"] += n_log_n(count(by_sequence_N, L * E * (T // S))).view(L, -1).sum(-1)
        place_T = torch.arange(T, device=selected_LTK.device) % S
        known = {
            "domain": view.domain_T,
            "token": view.ids_T % self.sizes.token_classes,
            "position": place_T * self.sizes.position_classes // S,
        }
        for name, class_T in known.items():
            C = self.sums[name].shape[-1]
            joint_N = (row_LTK * C + class_T[None, :, None]).flatten()
            self.sums[name] += count(joint_N, L * E * C).view(L, E, C)

    def _products(self, view: View, chosen_LTE: Tensor) -> None:
        """Sums over an expert's tokens as products with the 0/1 matrix of choices: the same order every time, where
        a scatter of floats on a GPU would add in any order."""
        counted_T = torch.ones_like(view.loss_T) if view.counted_T is None else view.counted_T.float()
        loss_T = torch.where(counted_T > 0, view.loss_T, 0.0)
        loss_LE2 = chosen_LTE.transpose(1, 2) @ torch.stack([loss_T, counted_T]).float().T
        self.sums["loss"] += loss_LE2[..., 0]
        self.sums["counted"] += loss_LE2[..., 1].long()
        token_sum_LED = torch.stack([c.T @ x.float() for c, x in zip(chosen_LTE, view.inputs, strict=True)])
        self.running["centroid_sum"] += token_sum_LED
        self.running["centroid_count"] += chosen_LTE.sum(1)

    def _close(self) -> None:
        """End of an update: its load against the one before, and a little less weight for old centroids."""
        sums, running = self.sums, self.running
        self.updates += 1
        known_L = running["before"].sum(-1) > 0
        sums["flutter"] += torch.where(known_L, total_variation(running["pending"], running["before"]), 0.0)
        sums["pairs"] += known_L
        sums["by_update"] += n_log_n(running["pending"]).sum(-1)
        running["before"].copy_(running["pending"])
        running["pending"].zero_()
        running["centroid_sum"] *= MEMORY
        running["centroid_count"] *= MEMORY

    def sequence_information(self) -> tuple[Tensor, Tensor]:
        """Nats between choice and sequence, in the window and inside its updates (mean over them), [L] each.

        I = (sum_se n ln n - sum_s n ln n - sum_e n ln n + N ln N) / N, where n counts choices: additive sums.
        """
        N = self.tokens * self.sizes.k
        each = N / self.sequences
        by_sequence_L = self.sums["by_sequence"] - self.sequences * each * math.log(each)
        by_expert_L = n_log_n(self.sums["selected"]).sum(-1)
        window_L = by_sequence_L - by_expert_L + N * math.log(N)
        if not self.updates:
            return window_L / N, window_L * math.nan
        within_L = by_sequence_L - self.sums["by_update"] + N * math.log(N / self.updates)
        return window_L / N, within_L / N
