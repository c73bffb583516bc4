"""Sums over the updates of a window: additive, on the device, without a wait for it.

Shapes: L layers, T tokens of a micro-batch, E experts, K chosen per token, D width, V token classes, P position
classes, C domains.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moe_lab.counting import count
from moe_lab.observe.confidence import gate_entropy
from moe_lab.observe.specialisation import POSITION_CLASSES, TOKEN_CLASSES, n_log_n
from moe_lab.routing import Routing

MEMORY = 0.99  # of the running centroids, per update: half of it is gone after 69 updates
CENTROID_TOKENS = 256  # per expert: at least so many of a micro-batch go into the centroids, or all that it has


@dataclass(frozen=True)
class View:
    """What observers see of one micro-batch: per MoE layer its Routing and its input [T, D] (detached).

    loss_T: task loss per token, detached, 0 where it does not count. counted_T: whether it does (None: all do).
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
    def classes(self) -> dict[str, int]:
        """How many classes there are of each thing that is known of a token."""
        return {"domain": self.domains, "token": self.token_classes, "position": self.position_classes}

    @property
    def position_classes(self) -> int:
        return min(self.seq_len, POSITION_CLASSES)


@cache
def places(T: int, S: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of tokens in sequences of S: each one's sequence and position class, [T]."""
    token_T = torch.arange(T, device=device)
    return token_T // S, token_T % S * classes // S


class Window:
    """`sums` start again with each window; `running` go on: centroids, and the load of the last update.

    For small models the calls cost more than the arithmetic: sums of one kind are columns of one tensor and grow by
    one addition. `sums` has the columns by name.
    """

    def __init__(self, sizes: Sizes, device: torch.device):
        self.sizes = sizes
        self.tokens = self.sequences = self.updates = 0  # of the window
        L, E = sizes.L, sizes.E
        self.sums: dict[str, Tensor] = {}

        def table(dtype: torch.dtype, shape: tuple[int, ...], widths: dict[str, int]) -> Tensor:
            whole = torch.zeros(*shape, sum(widths.values()), dtype=dtype, device=device)
            self.sums |= zip(widths, whole.split(list(widths.values()), -1), strict=True)
            return whole

        # Behind the table that counts, a row for tokens without a choice.
        self._joint = torch.zeros((L * E + 1) * sum(sizes.classes.values()), dtype=torch.int64, device=device)
        self._joint_LEC = self._joint[: -sum(sizes.classes.values())].view(L, E, -1)
        self.sums |= zip(sizes.classes, self._joint_LEC.split(list(sizes.classes.values()), -1), strict=True)
        self._counts = table(torch.int64, (L,), dict.fromkeys(("selected", "kept", "top1", "counted"), E))
        self._values = table(torch.float64, (L,), dict.fromkeys(("importance", "gate_mass", "loss"), E))
        scalars = ("entropy", "logit_norm", "logsumexp", "by_sequence", "flutter", "pairs", "by_update")
        self._scalars = torch.zeros(len(scalars), L, dtype=torch.float64, device=device)
        self.sums |= zip(scalars, self._scalars, strict=True)
        self._pending_LE = torch.zeros(
            L, E, dtype=torch.float64, device=device
        )  # of an update that is not complete yet
        # before: shares of the load, all 0 before the first update.
        self.running = {
            name: torch.zeros(L, E, *more, dtype=torch.float64, device=device)
            for name, more in {"before": (), "centroid_count": (), "centroid_sum": (sizes.D,)}.items()
        }
        self._one_hot_XE = torch.eye(E + 1, E, device=device)  # the last row, all zero: no choice
        self._first_L11 = E * torch.arange(L, device=device)[:, None, None]

    def reset(self) -> None:
        self.tokens = self.sequences = self.updates = 0
        for total in (self._joint_LEC, self._counts, self._values, self._scalars):
            total.zero_()

    @torch.no_grad()
    def add(self, view: View) -> None:
        """Sum up one micro-batch."""
        plans = [r.plan for r in view.routings]
        selected_LTK = torch.stack([plan.selected_TK for plan in plans])
        selected_LE = torch.stack([plan.selected_E for plan in plans])
        dropless = all(plan.kept_TK is None for plan in plans)
        kept_LE = selected_LE if dropless else torch.stack([plan.kept_E for plan in plans])
        L, T, K = selected_LTK.shape
        row_LTK = selected_LTK + self._first_L11  # experts of all layers, numbered through
        if any(plan.ragged for plan in plans):  # no choice: behind the last layer's last expert
            row_LTK = torch.where(selected_LTK < self.sizes.E, row_LTK, L * self.sizes.E)
        top1_LE = selected_LE
        if K > 1:
            top1_LE = count(row_LTK[:, :, 0].flatten(), L * self.sizes.E + 1)[:-1].view_as(selected_LE)
        chosen_LTKE = self._one_hot_XE.index_select(0, selected_LTK.flatten()).view(L, T, K, -1)
        chosen_LTE = chosen_LTKE[:, :, 0] if K == 1 else chosen_LTKE.sum(2)
        loss_LE, counted_LE = self._losses(view, chosen_LTE)
        importance_LE, *scores = self._gates(view)
        mass_LE = torch.stack([plan.importance_E() for plan in plans])
        self.tokens += T
        self.sequences += T // view.seq_len
        self._counts += torch.cat([selected_LE, kept_LE, top1_LE, counted_LE], -1)
        self._values += torch.cat([importance_LE, mass_LE, loss_LE], -1)
        self._scalars[:4] += torch.stack([*scores, self._histograms(view, row_LTK)])
        self._centroids(view, chosen_LTE)
        self._pending_LE += selected_LE
        if view.closes:
            self._close()

    def _gates(self, view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over tokens: the gate [L, E], its entropy, the norm and the logsumexp of the logits [L]."""
        probs_LTE = torch.stack([r.probs_TE for r in view.routings])
        entropy_L = gate_entropy(probs_LTE.flatten(1))  # of each token, summed over tokens
        # Tokens last: reductions over a short last dimension are slow on a CPU. In place: fresh memory is cold.
        logits_LET = torch.stack([r.logits_TE.T for r in view.routings])
        norm_LT = (logits_LET * logits_LET).sum(1).sqrt_()
        most_LT = logits_LET.amax(1)
        logsumexp_LT = logits_LET.sub_(most_LT[:, None]).exp_().sum(1).log_().add_(most_LT)
        return probs_LTE.sum(1), entropy_L, norm_LT.sum(1), logsumexp_LT.sum(1)

    def _histograms(self, view: View, row_LTK: Tensor) -> Tensor:
        """Joint counts of chosen expert and domain, token, position, all by one scatter into their columns.

        Returns sum_se n ln n - sum_s n ln n over the counts n of (sequence, expert) and of sequences [L].
        """
        L, E, C = self._joint_LEC.shape
        T, S, sizes = row_LTK.shape[1], view.seq_len, self.sizes
        sequence_T, position_T = places(T, S, sizes.position_classes, row_LTK.device)
        token_T = view.ids_T % sizes.token_classes
        # In the order of Sizes.classes, each behind the columns of those before it.
        class_3T = torch.stack([view.domain_T, token_T + sizes.domains, position_T + (C - sizes.position_classes)])
        cell_N = (row_LTK * C + class_3T[:, None, :, None]).flatten()
        self._joint.scatter_add_(0, cell_N, torch.ones_like(cell_N))
        cell_N = (row_LTK * (T // S) + sequence_T[:, None]).flatten()
        by_sequence_LEB = count(cell_N, (L * E + 1) * (T // S))[: L * E * (T // S)].view(L, E, -1)
        return n_log_n(by_sequence_LEB).sum((-2, -1)) - n_log_n(by_sequence_LEB.sum(1)).sum(-1)

    def _losses(self, view: View, chosen_LTE: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of an expert's tokens and how many of them carry one, [L, E] each.

        Products with the 0/1 matrix of choices add in the same order every time, where a scatter of floats on a GPU
        would add in any.
        """
        counted_T = torch.ones_like(view.loss_T) if view.counted_T is None else view.counted_T
        of_token_2T = torch.stack([view.loss_T, counted_T]).float()
        loss_LE, counted_LE = (of_token_2T.expand(len(chosen_LTE), -1, -1) @ chosen_LTE).unbind(1)
        return loss_LE, counted_LE.long()

    def _centroids(self, view: View, chosen_LTE: Tensor) -> None:
        """Sums of the inputs of an expert's tokens, over every n-th token, which starts one later at each update.

        Reading every input once more would cost as much as all other sums together.
        """
        _, T, E = chosen_LTE.shape
        every = max(1, T // (CENTROID_TOKENS * E))
        part = slice(self.updates % every, None, every)
        chosen_LTE = chosen_LTE[:, part]
        layers = zip(chosen_LTE, view.inputs, strict=True)
        self.running["centroid_sum"] += torch.stack([c_TE.T @ x_TD[part].float() for c_TE, x_TD in layers])
        self.running["centroid_count"] += chosen_LTE.sum(1)

    def _close(self) -> None:
        """End of an update: its load against the one before, and a little less weight for old centroids."""
        running, pending_LE = self.running, self._pending_LE
        total_L1 = pending_LE.sum(-1, keepdim=True)
        load_LE = pending_LE / total_L1.clamp_min(1)
        known_L = running["before"].sum(-1) > 0
        moved_L = (load_LE - running["before"]).abs().sum(-1) / 2 * known_L  # as dynamics.total_variation
        self._scalars[4:] += torch.stack([moved_L, known_L, n_log_n(pending_LE).sum(-1) - n_log_n(total_L1)[:, 0]])
        self.updates += 1
        running["before"].copy_(load_LE)
        pending_LE.zero_()
        running["centroid_sum"] *= MEMORY
        running["centroid_count"] *= MEMORY

    def sequence_information(self) -> tuple[Tensor, Tensor]:
        """Nats between choice and sequence, in the window and inside its updates (mean over them), [L] each.

        I = (sum_se n ln n - sum_s n ln n - sum_e n ln n + N ln N) / N, where n counts the N choices: additive sums.
        """
        N_L = self.sums["selected"].sum(-1)
        by_sequence_L, by_expert_L = self.sums["by_sequence"], n_log_n(self.sums["selected"]).sum(-1)
        window_L = by_sequence_L - by_expert_L + n_log_n(N_L)
        if not self.updates:
            return window_L / N_L, window_L * math.nan
        return window_L / N_L, (by_sequence_L - self.sums["by_update"]) / N_L
