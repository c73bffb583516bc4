"""What `moe-lab losses` measures the losses on that logits alone do not give: value, gradient, what reaches the dead.

Shapes: L MoE layers, T tokens, E experts, K chosen per token, D width.
"""

import math
from collections.abc import Callable

import pytest
import torch
from layers import norm, randn
from oracles import balance as oracle
from oracles import relu as relu_oracle
from torch import Tensor

from moe_lab import seeding, worth
from moe_lab.config import registered
from moe_lab.conventions import CONVENTIONS
from moe_lab.worth import Case, Worth

E, K, T, L = 6, 2, 12, 2
CASES = worth.situations(E, K, T, L, seed=3)
STD = math.log1p(math.e**0)  # softplus(0)
NOISY = [c for c in CONVENTIONS if c.noisy]
every_case = pytest.mark.parametrize("name", CASES)


def measured(name: str, case: Case, k: int = K) -> Worth:
    loss = worth.ours(name, case, k)
    assert loss is not None
    return worth.measure(loss)


def same(found: Worth, of: Callable[..., Tensor], leaves: list[Tensor], by_expert: list[int], dead_LE: Tensor) -> None:
    """As an oracle's mean over layers: `of` of a layer's leaves; by_expert: which of their dimensions are experts."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = torch.stack([of(i, *(leaf[i] for leaf in leaves)) for i in range(L)]).mean()
    grads = torch.autograd.grad(value, leaves)
    assert found.value == pytest.approx(value.item(), rel=1e-7, abs=1e-13)
    assert found.gradient == pytest.approx(norm(grads), rel=1e-7, abs=1e-13)
    assert (found.dead is None) == (not dead_LE.any())
    if found.dead is not None:
        dead = norm(g.movedim(d, 1)[dead_LE] for g, d in zip(grads, by_expert, strict=True))
        assert found.dead == pytest.approx(dead, rel=1e-7, abs=1e-18)


def without_tokens(scores_LTE: Tensor) -> Tensor:
    """Experts that are among no token's K best."""
    best_LTK = scores_LTE.argsort(-1, descending=True)[..., :K]
    return torch.tensor([[not (best_TK == e).any() for e in range(E)] for best_TK in best_LTK])


def test_every_loss_is_measured_in_every_situation():
    for name in worth.names():
        for case in CASES.values():
            loss = worth.ours(name, case, K)
            assert (loss is None) == registered("balance")[name].moves_bias
            assert loss is None or math.isfinite(worth.measure(loss).gradient)


# The choice of another router


@every_case
def test_load_is_of_shazeers_noise_as_it_starts(name: str):
    case = CASES[name]
    noisy_LTE = case.logits_LTE + STD * case.noise_LTE

    def of(i: int, clean_TE: Tensor) -> Tensor:
        return oracle.load(clean_TE, clean_TE + STD * case.noise_LTE[i], torch.full_like(clean_TE, STD), K)

    same(measured("load", case), of, [case.logits_LTE], [2], without_tokens(noisy_LTE))


@pytest.mark.parametrize("k", [1, 3])
def test_other_loads_with_noise(k: int):
    """The sum over layers, and the same with the variance of a sample, E / (E - 1) as large."""
    case = CASES["skewed"]
    rows = zip(case.logits_LTE, case.noise_LTE, strict=True)
    std_TE = torch.full_like(case.logits_LTE[0], STD)
    expected = sum(oracle.load(z_TE, z_TE + STD * n_TE, std_TE, k).item() for z_TE, n_TE in rows)
    found = {c.name: worth.theirs(c, case, k).value.item() for c in NOISY}
    assert found == {
        "Shazeer load": pytest.approx(expected, rel=1e-9),
        "its port's load": pytest.approx(expected * E / (E - 1), rel=1e-9),
    }


def test_load_at_balance_and_at_collapse():
    """0, since the noise rotates with the logits; E / k - 1 where k experts have all tokens."""
    found = {name: measured("load", case).value for name, case in worth.situations(8, 2, 64, 2, seed=0).items()}
    assert found["balanced"] == pytest.approx(0, abs=1e-12)
    assert found["collapse"] == pytest.approx(8 / 2 - 1, rel=1e-9)


def test_a_load_needs_a_choice():
    for convention in NOISY:
        with pytest.raises(worth.Missing, match="a choice"):
            worth.theirs(convention, CASES["balanced"], E)
    with pytest.raises(worth.Missing, match="a choice"):
        worth.ours("load", CASES["balanced"], E)


@every_case
def test_l1_is_of_relu_gates_at_the_first_lambda(name: str):
    case = CASES[name]

    def of(i: int, logits_TE: Tensor) -> Tensor:
        return 1e-8 * relu_oracle.regulariser([logits_TE.relu()], K, load=True)

    same(measured("l1_adaptive", case), of, [case.logits_LTE], [2], (case.logits_LTE <= 0).all(1))


def test_l1_by_hand():
    """Two experts, k = 1, two tokens: gates 3, 0 and 1, 2. f = 2/2 (2, 1): lambda (2 (3 + 1) + 1 (0 + 2)) / 2 = 5
    lambda; gradient f/2 where a gate is open: lambda sqrt(1 + 1 + 1/4)."""
    found = measured("l1_adaptive", worth.given(torch.tensor([[[3.0, -1.0], [1.0, 2.0]]]).double(), 0), k=1)
    assert (found.value, found.gradient) == (pytest.approx(5e-8), pytest.approx(1.5e-8))
    assert found.dead is None


# Weights


@every_case
def test_the_layer_of_a_situation_makes_its_logits(name: str):
    """Of tokens that are a situation's logits without the offset, and 1 along the shared direction."""
    case = CASES[name]
    rows_LED = case.rows_LED()
    assert rows_LED.shape == (L, E, E + 1)
    x_LTD = torch.cat([CASES["balanced"].logits_LTE, torch.ones(L, T, 1)], -1)
    torch.testing.assert_close(x_LTD @ rows_LED.transpose(1, 2), case.logits_LTE)


OF_WEIGHTS = [(loss, name) for loss in ("simbal", "orthogonal_experts", "erc") for name in CASES]
OF_WEIGHTS.remove(("erc", "balanced"))  # every norm is 0, where the oracle's root has no gradient; by hand below


@pytest.mark.parametrize(("loss", "name"), OF_WEIGHTS)
def test_losses_of_weights(loss: str, name: str):
    case = CASES[name]
    rows_LED = case.rows_LED()
    uniform_LED = [seeding.noise("uniform", (E, E + 1), "losses", 3, i, "delta").double() for i in range(L)]
    by_rows = {
        "simbal": lambda i, rows, read: oracle.simbal(rows) + 0 * read.sum(),
        "orthogonal_experts": lambda i, rows, read: oracle.orthogonal_experts(read) + 0 * rows.sum(),
        "erc": lambda i, rows, read: oracle.erc(rows, read, uniform_LED[i], 1.0),
    }
    leaves = [rows_LED, rows_LED[:, :, None]]
    same(measured(loss, case), by_rows[loss], leaves, [1, 1], without_tokens(case.logits_LTE))


def test_simbal_by_hand():
    """|R R^T - I| is |o_i o_j|, summed (sum |o|)^2: 80^2 in a collapse of 8 experts. d/dR = 2 sign(o o^T) R: of each
    row 2 in E directions and 2 * 80 in the shared one; six rows are dead; the mean of two layers halves each."""
    cases = worth.situations(8, 2, 64, 2, seed=0)
    assert measured("simbal", cases["balanced"]).value == 0
    found = measured("simbal", cases["collapse"])
    row = math.sqrt(8 * 2**2 + (2 * 80) ** 2) / 2
    assert found.value == pytest.approx(6400)
    assert found.gradient == pytest.approx(row * math.sqrt(2 * 8))
    assert found.dead == pytest.approx(row * math.sqrt(2 * 6))


def test_orthogonal_experts_by_hand():
    """Rows (u_i, +-10): the squared cosine of any two is (100/101)^2."""
    assert measured("orthogonal_experts", CASES["balanced"]).value == 0
    assert measured("orthogonal_experts", CASES["collapse"]).value == pytest.approx((100 / 101) ** 2)


def test_erc_by_hand():
    """At balance rows and experts are the unit vectors: each expert hears its own row alone. 0, and no gradient."""
    found = measured("erc", CASES["balanced"])
    assert (found.value, found.gradient) == (0, 0)


def test_logits_alone_tell_no_weights():
    alone = worth.given(randn(L, T, E), 0)
    untold = {name for name in worth.names() if worth.based_on(name) == "weights"}
    assert untold == {"erc", "orthogonal_experts", "simbal"}
    for name in worth.names():
        if name in untold:
            with pytest.raises(worth.Missing, match="weights"):
                worth.ours(name, alone, K)
        else:
            worth.ours(name, alone, K)


def test_noise_is_standard_normal_and_of_the_seed():
    first, same, other = (worth.given(torch.zeros(2, 500, 8).double(), seed).noise_LTE for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.mean().abs() < 0.05 and abs(first.std() - 1) < 0.05
