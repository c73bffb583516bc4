"""What an expert's tokens have in common, from joint counts of (expert, something known of the token).

Shapes: L layers, E experts, C classes of what is known (a domain, a token id, a stretch of positions).
"""

import torch
from torch import Tensor

from moe_lab.observe.metric import MOST_EXPERTS, declare

TOPIC = "Specialisation: what the experts' tokens have in common"
TOKEN_CLASSES = 1024  # larger vocabularies are folded (id modulo this), which can only lower the information
POSITION_CLASSES = 64  # longer sequences are cut into this many equal stretches

_NMI = "I(e; x) / min(H(e), H(x)) from the window's joint counts of (chosen expert, x)"
_FLOOR = "(C - 1)(A - k) / (2 N) / min(H(e), H(x)); N choices, A experts and C classes that occur"


class Joint:
    """Counts of (chosen expert, class) [L, E, C], with what follows from them; k distinct choices per token."""

    def __init__(self, joint_LEC: Tensor, k: int):
        p_LEC = joint_LEC.double() / joint_LEC.sum((-2, -1), keepdim=True)
        expert_LE, class_LC = p_LEC.sum(-1), p_LEC.sum(-2)
        self.h_expert_L, self.h_class_L = _entropy(expert_LE), _entropy(class_LC)
        self.information_L = (self.h_expert_L + self.h_class_L - _entropy(p_LEC.flatten(1))).clamp_min(0)
        self.experts_L, self.classes_L = (expert_LE > 0).sum(-1), (class_LC > 0).sum(-1)
        self.choices_L, self.k = joint_LEC.sum((-2, -1)).double(), k

    def normalise(self, nats_L: Tensor) -> Tensor:
        """By the smaller entropy, so that 1 means that one determines the other. 0 where all choices fell on one
        expert (it tells nothing), NaN where only one class occurs (there is nothing to tell)."""
        share_L = (nats_L / torch.minimum(self.h_expert_L, self.h_class_L)).clamp_max(1)
        return torch.where(self.h_class_L > 0, torch.where(self.h_expert_L > 0, share_L, 0.0), torch.nan)

    def nmi(self) -> Tensor:
        return self.normalise(self.information_L)

    def floor(self) -> Tensor:
        """Mean of `nmi` when every choice is made at random (Miller 1955, for k distinct choices per token)."""
        free_L = (self.classes_L - 1) * (self.experts_L - self.k).clamp_min(0)
        return self.normalise(free_L / (2 * self.choices_L))

    def floor_by_sequence(self, information_L: Tensor, sequences: int) -> Tensor:
        """Mean of `nmi` when whole sequences get a random class: the classes' share of what tells sequences apart.

        information_L: nats between choice and sequence. Tokens of one sequence choose alike, so a few sequences per
        class tell the class by accident; for random choices this is `floor`.
        """
        share_L = ((self.classes_L - 1) / max(sequences - 1, 1)).clamp_max(1)
        return self.normalise(information_L * share_L)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def n_log_n(n: Tensor) -> Tensor:
    """n ln n with 0 ln 0 = 0, fp64."""
    return torch.xlogy(n.double(), n.double())


for _x, _what, _reads in (
    (
        "domain",
        "the token's domain",
        "The one of the three that means a division of labour. Undefined for one domain.",
    ),
    (
        "token",
        f"the token's id (modulo {TOKEN_CLASSES})",
        "High already at a random start, since the input carries the token: a hash of the vocabulary gives 1.",
    ),
    (
        "position",
        f"the token's position (at most {POSITION_CLASSES} equal stretches)",
        "Experts that learned the position are an artefact: balanced, and without meaning.",
    ),
):
    declare(
        f"nmi_{_x}",
        TOPIC,
        f"{_NMI}; x = {_what}",
        span=("0", "1"),
        balanced="0 where the choice ignores x, 1 where one determines the other",
        collapsed="0",
        floor=f"its own row, nmi_{_x}_floor",
        worst="max" if _x == "position" else "min" if _x == "domain" else None,
        reads=_reads,
    )
    declare(
        f"nmi_{_x}_floor",
        TOPIC,
        _FLOOR if _x != "domain" else "I(e; sequence) (C - 1) / (B - 1) / min(H(e), H(x)); B sequences, C domains",
        span=("0", "1"),
        balanced="falls as 1 over the size of the window",
        collapsed="0",
        source="Miller 1955; (A - k) for k distinct choices" if _x != "domain" else "ours",
        reads=f"What nmi_{_x} shows by accident: only the part above it is signal."
        + (" Tokens of a sequence choose alike, so it shrinks with sequences, not tokens." * (_x == "domain")),
    )

declare(
    "expert_loss",
    TOPIC,
    "sum_t 1[e chosen by t] loss_t / #{t: e chosen by t}, over tokens that carry a loss",
    shape="LE",
    span=("0", "inf"),
    balanced="alike where the choice ignores difficulty",
    collapsed="the task loss at the k experts, undefined elsewhere",
    floor="std_t(loss) sqrt(E / (k T)) around the task loss",
    reads="nats per token. Balanced counts with unequal losses: tokens have not tried the others; more sampling.",
)


declare(
    "domain_counts",
    TOPIC,
    "#{choices of expert e by tokens of domain c}",
    shape="LEC",
    span=("0", "T"),
    balanced="any: nmi_domain says how far they are from what two independent margins would give",
    collapsed="all at k experts, 0 elsewhere",
    reads=f"Who serves which domain; the domains' names are in env.json. Left out beyond {MOST_EXPERTS} experts.",
    when="evaluation",
)


def expert_loss(loss_sum_LE: Tensor, counted_LE: Tensor) -> Tensor:
    """[L, E], [L, E] -> [L, E]; NaN for an expert without tokens."""
    return loss_sum_LE.double() / counted_LE.double()
