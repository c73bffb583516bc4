"""Every metric by hand at balance, at collapse and at one uneven point, in float64.

Shapes: L layers, T tokens, E experts, K chosen per token, D width, C classes.
"""

import math
from itertools import permutations

import pytest
import torch
from scipy import stats
from torch import Tensor

from moe_lab.observe import confidence, dynamics, geometry, load, specialisation
from moe_lab.observe.metric import METRICS, over_layers

EVEN, UNEVEN, ONE = [6, 6, 6], [9, 6, 3], [18, 0, 0]  # counts of 18 choices on 3 experts
LN3 = math.log(3)
# Entropy of 1/2, 1/3, 1/6: (ln 2)/2 + (ln 3)/3 + (ln 6)/6 = 2/3 ln 2 + 1/2 ln 3
H_UNEVEN = 2 / 3 * math.log(2) + LN3 / 2


def t(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("formula", "even", "uneven", "one"),
    [
        # mean 6; squared deviations 9, 0, 9: variance 6, CV sqrt(6)/6. Collapse: 144, 36, 36: 72, sqrt(72)/6 = sqrt(2)
        (load.cv, 0, math.sqrt(6) / 6, math.sqrt(2)),
        # the ceiling for E = 3, k = 1 is sqrt(2): sqrt(6)/6/sqrt(2) = 1/sqrt(12)
        (lambda c: load.cv_of_ceiling(c, 1), 0, 1 / math.sqrt(12), 1),
        (load.max_vio, 0, 9 / 6 - 1, 18 / 6 - 1),
        # differences: 2 (3 + 6 + 3) = 24, over 2 * 9 * 6 = 108: 2/9. Collapse: 2 (18 + 18) = 72 / 108 = 1 - 1/3
        (load.gini, 0, 2 / 9, 2 / 3),
        (load.min_max, 1, 3 / 9, 0),
        (load.load_entropy, 1, H_UNEVEN / LN3, 0),
        (load.effective_experts, 3, math.exp(H_UNEVEN), 1),
        (load.dead_experts, 0, 0, 2),
    ],
)
def test_load_by_hand(formula, even: float, uneven: float, one: float):
    got = formula(torch.tensor([EVEN, UNEVEN, ONE]))
    assert got.double().tolist() == pytest.approx([even, uneven, one], abs=1e-12)


def test_ceilings_of_top_2():
    """E = 8, k = 2, every token to the same two: MaxVio 3, CV sqrt(3), Gini 3/4, entropy ln 2 / ln 8 = 1/3."""
    counts = torch.tensor([[100, 100, 0, 0, 0, 0, 0, 0]])
    assert load.max_vio(counts).item() == 3
    assert load.cv(counts).item() == pytest.approx(math.sqrt(3)) == load.cv_ceiling(8, 2)
    assert load.cv_of_ceiling(counts, 2).item() == pytest.approx(1)
    assert load.gini(counts).item() == pytest.approx(0.75)
    assert load.load_entropy(counts).item() == pytest.approx(1 / 3)
    assert load.effective_experts(counts).item() == pytest.approx(2)
    assert load.dead_experts(counts).item() == 6


def test_dead_is_below_one_percent_of_the_mean():
    # 400 choices, mean 100, so that the line is at 1: an expert with 1 lives.
    assert load.dead_experts(torch.tensor([[200, 199, 1, 0], [201, 197, 1, 1]])).tolist() == [1, 0]
    assert load.dead_experts(torch.zeros(1, 4)).tolist() == [4]  # all ReLU gates shut


def test_dropped_by_hand():
    selected, kept = torch.tensor([EVEN, UNEVEN, ONE]), torch.tensor([[6, 6, 6], [6, 6, 3], [6, 0, 0]])
    # capacity 6: nothing, 3 of 18, 12 of 18 = 1 - CF k/E with CF = 1
    assert load.dropped_fraction(selected, kept).tolist() == pytest.approx([0, 3 / 18, 12 / 18])


def test_nothing_to_choose_is_undefined_not_infinite():
    assert load.cv_of_ceiling(torch.tensor([[5, 5]]), 2).isnan().all()
    assert load.load_entropy(torch.tensor([[5]])).isnan().all()
    assert confidence.mutual_information(t([5.0]), t([0.0])[0], 5).isnan().all()


def test_confidence_by_hand():
    uniform, certain = t(*[[1 / 3] * 3] * 3), torch.eye(3, dtype=torch.float64)
    uneven = t([0.5, 1 / 3, 1 / 6])
    assert confidence.gate_entropy(uniform).tolist() == pytest.approx([LN3] * 3)
    assert confidence.gate_entropy(certain).tolist() == [0, 0, 0]
    assert confidence.gate_entropy(uneven).item() == pytest.approx(H_UNEVEN)

    def both(probs_TE: Tensor) -> list[float]:
        entropy_L = confidence.gate_entropy(probs_TE).sum()[None]
        information = confidence.mutual_information(probs_TE.sum(0)[None], entropy_L, len(probs_TE))
        return [confidence.token_entropy(entropy_L, len(probs_TE), 3).item(), information.item()]

    assert both(uniform) == pytest.approx([1, 0])  # balanced because undecided
    assert both(certain) == pytest.approx([0, 1])  # balanced because sorted
    assert both(t([1, 0, 0], [1, 0, 0], [1, 0, 0])) == pytest.approx([0, 0])  # collapsed
    # Two tokens, (1/2, 1/3, 1/6) and (1/6, 1/3, 1/2): the mean gate is uniform.
    assert both(t([1 / 2, 1 / 3, 1 / 6], [1 / 6, 1 / 3, 1 / 2])) == pytest.approx([H_UNEVEN / LN3, 1 - H_UNEVEN / LN3])


def test_a_gate_of_the_network_gives_entropy_without_nan():
    logits = torch.tensor([[0.0, -200.0, 200.0]])
    assert confidence.gate_entropy(logits.softmax(-1)).tolist() == [0]


def nmi(joint: list[list[float]], k: int = 1) -> float:
    return specialisation.Joint(torch.tensor([joint]), k).nmi().item()


def test_specialisation_by_hand():
    assert nmi([[4, 0, 0], [0, 4, 0], [0, 0, 4]]) == pytest.approx(1)  # one expert per class
    assert nmi([[4, 4, 4], [4, 4, 4], [4, 4, 4]]) == pytest.approx(0)  # independent
    assert nmi([[4, 4, 4], [0, 0, 0], [0, 0, 0]]) == 0  # collapsed: nothing told
    assert math.isnan(nmi([[4], [5], [6]]))  # one class: nothing to tell
    # Expert 0 gets class 0 and half of class 1, expert 1 the rest (of 4, 4, 4): rows 6 and 6, H(e) = ln 2.
    # H(e | class) = (0 + ln 2 + 0) / 3, so that I = 2/3 ln 2, over min(ln 2, ln 3) = 2/3.
    assert nmi([[4, 2, 0], [0, 2, 4], [0, 0, 0]]) == pytest.approx(2 / 3)


def test_information_against_brute_force():
    g = torch.Generator().manual_seed(1)
    joint = torch.randint(0, 9, (2, 4, 5), generator=g)
    joint[0, 2] = 0  # an expert without tokens
    for counts, got in zip(joint.tolist(), specialisation.Joint(joint, 1).nmi().tolist(), strict=True):
        total = sum(map(sum, counts))
        pe = [sum(row) / total for row in counts]
        pc = [sum(row[c] for row in counts) / total for c in range(5)]
        information = sum(
            n / total * math.log(n / total / pe[e] / pc[c])
            for e, row in enumerate(counts)
            for c, n in enumerate(row)
            if n
        )
        entropies = [-sum(p * math.log(p) for p in ps if p) for ps in (pe, pc)]
        assert got == pytest.approx(information / min(entropies))


def test_expert_loss_by_hand():
    got = specialisation.expert_loss(t([6.0, 9.0, 0.0]), torch.tensor([[3, 2, 0]])).tolist()
    assert got[0][:2] == [2, 4.5] and math.isnan(got[0][2])


def test_movement_by_hand():
    before, now = torch.tensor([EVEN, UNEVEN, ONE]), torch.tensor([EVEN, [3, 6, 9], [0, 18, 0]])
    # loads (1/2, 1/3, 1/6) -> (1/6, 1/3, 1/2): 1/3 changes hands; from one expert to another: all of it
    assert dynamics.total_variation(before, now).tolist() == pytest.approx([0, 1 / 3, 1])
    assert dynamics.total_variation(before, 7 * now)[1].item() == pytest.approx(1 / 3)  # whatever the window's size


def test_churn_by_hand():
    before = torch.tensor([[[0, 1], [2, 3]]])
    # the order among the k does not count; one of four choices changed; all did
    for now, expected in (([[1, 0], [3, 2]], 0), ([[1, 0], [2, 0]], 1 / 4), ([[2, 3], [0, 1]], 1)):
        assert dynamics.churn(before, torch.tensor([now]), 4).tolist() == [expected]


def test_router_cosines_by_hand():
    def both(*rows: list[float]) -> list[float]:
        return [x.item() for x in geometry.router_cosines(t(*rows))]

    assert both([2, 0, 0], [0, 1, 0], [0, 0, 3]) == [0, 0]
    assert both([2, 0, 0], [1, 0, 0], [3, 0, 0]) == [1, 1]
    # pairs: -1, 0, 0
    assert both([2, 0, 0], [-1, 0, 0], [0, 1, 0]) == pytest.approx([-1 / 3, 1 / 3])
    assert all(math.isnan(x) for x in both([0, 0, 0], [0, 0, 0]))  # rows of zeros have no direction


def test_coupling_by_hand():
    router = torch.eye(3, dtype=torch.float64)
    # Two neurons per expert: one along its router row, one against it.
    neurons = torch.stack([torch.stack([row * 2, -row]) for row in router])
    got = {name: x.item() for name, x in geometry.coupling(router, neurons).items()}
    assert (got["coupling_matched"], got["coupling_mismatched"], got["coupling_gap"]) == (1, 0, 1)
    assert (got["coupling_signed_matched"], got["coupling_signed_gap"]) == (0, 0)
    # Every neuron of every expert along the first row: matched (1 + 0 + 0)/3, mismatched two of six pairs.
    same = torch.tensor([1.0, 0, 0], dtype=torch.float64).expand(3, 2, 3)
    got = {name: x.item() for name, x in geometry.coupling(router, same).items()}
    assert got["coupling_matched"] == got["coupling_mismatched"] == pytest.approx(1 / 3)
    assert got["coupling_signed_gap"] == pytest.approx(0)
    assert got["coupling_baseline"] == pytest.approx(math.sqrt(2 / (math.pi * 3)))


def test_permutation_z_is_that_of_all_orders():
    x_EE = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    sums = torch.tensor([sum(x_EE[i, j] for i, j in enumerate(order)) for order in permutations(range(5))])
    assert geometry.permutation_z(x_EE).item() == pytest.approx(
        ((x_EE.trace() - sums.mean()) / sums.std(correction=0)).item()
    )
    assert geometry.permutation_z(torch.eye(5)).item() == pytest.approx(4)  # the largest there is
    assert geometry.permutation_z(x_EE[:1].expand(5, 5)).isnan()  # copies of one expert


def test_cosine_baseline_by_simulation():
    g = torch.Generator().manual_seed(0)
    rows, neurons = torch.randn(8, 128, generator=g), torch.randn(8, 64, 128, generator=g)
    got = geometry.coupling(rows, neurons)
    assert geometry.cosine_baseline(128) == pytest.approx(0.0705, abs=1e-4)
    assert got["coupling_mismatched"].item() == pytest.approx(0.0705, rel=0.03)
    assert abs(got["coupling_gap"].item()) < 4 * 0.6 / math.sqrt(128 * 8 * 64)


def test_centroid_cosines_by_hand():
    router = t([1, 0, 0], [0, 1, 0], [0, 0, 1])
    # Each expert's tokens lie along its row, on top of a large part (9, 9, 9) that all share: centred 1, raw less.
    sums = (router * 3 + 9) * 2
    centred, raw = geometry.centroid_cosines(router, sums, torch.tensor([2, 2, 2]))
    assert centred.item() == pytest.approx(1)
    assert raw.item() == pytest.approx(12 / math.sqrt(12**2 + 9**2 + 9**2))
    # An expert without tokens does not count; with all tokens at one expert the centred cosine is undefined.
    centred, raw = geometry.centroid_cosines(router, t([4, 0, 0], [0, 0, 0], [0, 0, 0]), torch.tensor([2, 0, 0]))
    assert centred.isnan() and raw.item() == pytest.approx(1)


def test_correlations_against_scipy_with_ties():
    x, y = t([1, 2, 2, 3, 5, 5, 5, 9]), t([2, 1, 1, 4, 3, 3, 7, 7])
    assert geometry.ranks(x[0]).tolist() == [1, 2.5, 2.5, 4, 6, 6, 6, 8]
    assert geometry.pearson(x, y).item() == pytest.approx(stats.pearsonr(x[0], y[0])[0])
    assert geometry.spearman(x, y).item() == pytest.approx(stats.spearmanr(x[0], y[0])[0])
    assert geometry.spearman(t([1, 2, 3]), t([1, 8, 27])).item() == pytest.approx(1)
    assert geometry.pearson(t([1, 1, 1]), t([1, 2, 3])).isnan().all()


def test_over_layers_takes_the_declared_bad_direction():
    assert over_layers(METRICS["load_cv"], [0.1, None, 0.3]) == {"mean": pytest.approx(0.2), "worst": 0.3}
    assert over_layers(METRICS["effective_experts"], [4.0, 2.0])["worst"] == 2.0
    assert over_layers(METRICS["logsumexp"], [1.0, 3.0]) == {"mean": 2.0}
    assert over_layers(METRICS["load_cv"], [None]) == {"mean": None, "worst": None}
