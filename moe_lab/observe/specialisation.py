"""What an expert's tokens have in common, from joint counts of (expert, something known of the token).

Shapes: L layers, E experts, C classes of what is known (a domain, a token id, a stretch of positions).
"""

import torch
from torch import Tensor

from moe_lab.observe.metric import declare

TOPIC = "Specialisation: what the experts' tokens have in common"
TOKEN_CLASSES = 1024  # larger vocabularies are folded (id modulo this), which can only lower the information
POSITION_CLASSES = 64  # longer sequences are cut into this many equal stretches

_NMI = "I(e; x) / min(H(e), H(x)) from the window's joint counts of (chosen expert, x)"
_FLOOR = "(C - 1)(A - k) / (2 N) / min(H(e), H(x)); N choices, A experts and C classes that occur"


def nmi_floor(T: int, E: int, k: int, C: int, norm: float) -> float:
    """Expected plug-in information of independent choices (Miller 1955, for k distinct picks per token) over norm."""
    return (C - 1) * (E - k) / (2 * T * k) / norm


def normalised_mutual_information(joint_LEC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Counts [L, E, C] -> (nmi [L], its sampling floor [L]).

    Normalised by the smaller entropy, so that 1 means that one determines the other. 0 where all choices fell on one
    expert (it tells nothing), NaN where only one class occurs (there is nothing to tell). Choices within a sequence
    are not independent, so the true floor of small windows is higher.
    """
    p_LEC = joint_LEC.double() / joint_LEC.sum((-2, -1), keepdim=True)
    expert_LE, class_LC = p_LEC.sum(-1), p_LEC.sum(-2)
    h_expert_L, h_class_L = _entropy(expert_LE), _entropy(class_LC)
    information_L = (h_expert_L + h_class_L - _entropy(p_LEC.flatten(1))).clamp_min(0)
    norm_L = torch.minimum(h_expert_L, h_class_L)
    experts_L, classes_L = (expert_LE > 0).sum(-1), (class_LC > 0).sum(-1)
    choices_L = joint_LEC.sum((-2, -1)).double()
    bias_L = (classes_L - 1) * (experts_L - k).clamp_min(0) / (2 * choices_L)

    def normalise(nats_L: Tensor) -> Tensor:
        told_L = torch.where(h_expert_L > 0, (nats_L / norm_L).clamp_max(1), 0.0)
        return torch.where(h_class_L > 0, told_L, torch.nan)

    return normalise(information_L), normalise(bias_L)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


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
        _FLOOR,
        span=("0", "1"),
        balanced="falls as 1/N",
        collapsed="0",
        source="Miller 1955; (A - k) where each token makes k distinct choices",
        reads=f"What nmi_{_x} shows if choice and x are independent: only the part above it is signal.",
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


def expert_loss(loss_sum_LE: Tensor, counted_LE: Tensor) -> Tensor:
    """[L, E], [L, E] -> [L, E]; NaN for an expert without tokens."""
    return loss_sum_LE.double() / counted_LE.double()
