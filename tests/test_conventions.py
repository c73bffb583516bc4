"""What others call the balance loss: against their libraries where these can be installed, else against their formulas
in plain loops; and that a converted coefficient gives the gradient of the original.

Shapes: L MoE layers, T tokens, B sequences, E experts, K chosen per token.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import randn
from oracles import conventions as oracle
from peers import FP32, FP64, close, gating, hf, hf_config, set_weights
from torch import Tensor

from moe_lab import conventions, worth
from moe_lab.config import registered
from moe_lab.conventions import CONVENTIONS, Convention

L, B, S, E = 2, 2, 9, 5
T = B * S
every_convention = pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: c.value.__name__)


def skewed(layers: int = L, tokens: int = T) -> Tensor:
    """Logits that prefer other experts in each layer."""
    slope_LE = torch.stack([torch.linspace(2, -2, E).roll(i).double() for i in range(layers)])
    return (1.5 * randn(layers, tokens, E) + slope_LE[:, None]).requires_grad_()


def close_losses(ours: Tensor, theirs: Tensor, by: Tensor, tolerance: float) -> None:
    (mine,), (other,) = (torch.autograd.grad(loss, by, retain_graph=True) for loss in (ours, theirs))
    close({"value": (ours, theirs), "gradient": (mine, other)}, tolerance)


# Formulas


@every_convention
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("sequences", [1, B])
def test_formula_in_plain_loops(convention: Convention, k: int, sequences: int):
    logits_LTE = skewed()
    expected = getattr(oracle, convention.value.__name__)(logits_LTE, k, sequences)
    got = convention.value(logits_LTE, k, sequences)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    mine, other = (torch.autograd.grad(x + 0 * logits_LTE.sum(), logits_LTE)[0] for x in (got, expected))
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-14)


@every_convention
@pytest.mark.parametrize(("k", "layers"), [(1, 1), (2, 1), (2, 3)])
def test_at_balance_and_at_collapse(convention: Convention, k: int, layers: int):
    """As the docstrings say: even choices and probabilities, and k experts that share everything."""
    name = convention.value.__name__
    if name.startswith("z_"):
        return
    even = worth.situations(8, k, 64, layers, seed=0)["balanced"].logits_LTE
    assert convention.value(even, k, 1).item() == pytest.approx(oracle.at_balance(name, 8, k, layers), abs=1e-12)
    collapsed = torch.full((layers, 60, 8), -30.0, dtype=torch.float64)
    for t in range(60):
        collapsed[:, t, :k] = 1e-9 * torch.arange(k).roll(t).double()  # first choices take turns
    expected = oracle.at_collapse(name, 8, k, layers)
    assert convention.value(collapsed, k, 1).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_z_loss_by_hand():
    """Two layers, logsumexp 1 and 3: the mean of squares is 5, the sum over layers 10."""
    logits_LTE = torch.tensor([1.0, 3.0])[:, None, None].double().expand(2, 7, 4) - math.log(4)
    assert conventions.z_mean(logits_LTE, 1).item() == pytest.approx(5)
    assert conventions.z_sum(logits_LTE, 1).item() == pytest.approx(10)


# Libraries


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "jetmoe", "nllb_moe"])
def test_transformers_pool_the_layers(name: str, k: int):
    logits_LTE = skewed(layers=3)
    theirs = hf(name).load_balancing_loss_func(tuple(logits_LTE), E, k)
    close_losses(conventions.hf_mixtral(logits_LTE, k), theirs, logits_LTE, FP32)


def test_a_whole_olmoe_model():
    """aux_loss of a model that reads two sequences, from the router logits that it returns."""
    config = hf_config(
        "OlmoeConfig",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=E,
        num_experts_per_tok=2,
        output_router_logits=True,
    )
    out = hf("olmoe").OlmoeForCausalLM(config)(torch.arange(2 * 9).view(2, 9))
    logits_LTE = torch.stack(out.router_logits).double()
    assert logits_LTE.shape == (2, 18, E)
    assert conventions.hf_mixtral(logits_LTE, 2).item() == pytest.approx(out.aux_loss.item(), rel=1e-6)


@pytest.mark.parametrize("sequences", [1, B])
def test_transformers_switch_losses(sequences: int):
    model = hf("switch_transformers")
    logits_LTE = skewed()
    joined_BNE, chosen_BN = unpacked(model, logits_LTE, sequences)
    theirs = model.load_balancing_loss_func(joined_BNE.softmax(-1), chosen_BN)
    close_losses(conventions.hf_switch(logits_LTE, 1, sequences), theirs, logits_LTE, FP32)  # its counts are fp32
    close_losses(conventions.z_mean(logits_LTE, 1), model.router_z_loss_func(joined_BNE), logits_LTE, FP64)


def unpacked(model: Any, logits_LTE: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Joined over layers by the model's own method."""
    layers = tuple(logits_TE.view(sequences, -1, E) for logits_TE in logits_LTE)
    return model.SwitchTransformersForConditionalGeneration._unpack_router_logits(None, layers)


@pytest.mark.parametrize("k", [2, 3])
def test_st_moe_pytorch(k: int):
    """Its gate reads the logits as tokens; a layer adds its balance loss and its z-loss."""
    gate = gating(E, E, k)
    set_weights({gate.to_gates.weight: torch.eye(E)})
    logits_LTE = skewed()
    found = [gate(logits_TE.view(B, S, E))[2:] for logits_TE in logits_LTE]
    balance, z = (torch.stack(losses).sum() for losses in zip(*found, strict=True))
    close_losses(conventions.first_choice(logits_LTE, k, B), balance, logits_LTE, FP32)  # its counts are fp32
    close_losses(conventions.z_sum(logits_LTE, k, B), z, logits_LTE, FP64)


@pytest.mark.parametrize("k", [1, 3])
def test_deepseek_v3_chooses_the_same_experts(k: int):
    """The counts of the loss from the choice of transformers' block; the loss itself is the paper's."""
    config = hf_config(
        "DeepseekV3Config",
        hidden_size=E,
        moe_intermediate_size=E,
        n_routed_experts=E,
        num_experts_per_tok=k,
        n_group=1,
        topk_group=1,
    )
    block = hf("deepseek_v3").DeepseekV3MoE(config).double()
    set_weights({block.gate.weight: torch.eye(E), block.gate.e_score_correction_bias: torch.zeros(E)})
    logits_TE = skewed(layers=1)[0]
    _, _, chosen_TK = block.gate(logits_TE)
    f_E = torch.bincount(chosen_TK.flatten(), minlength=E) * E / (k * T)
    s_TE = logits_TE.sigmoid()
    expected = (f_E * (s_TE / s_TE.sum(-1, keepdim=True)).mean(0)).sum()
    close_losses(conventions.deepseek_v3(logits_TE[None], k), expected, logits_TE, FP32)


# Conversion


@every_convention
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_converted_coefficient_gives_the_original_gradient(convention: Convention, k: int, layers: int):
    """With layers that are loaded alike, for those who pool them."""
    if not convention.like:
        assert convention.weight(E, k, layers) is None
        return
    assert convention.like in registered("balance")
    factor = convention.weight(E, k, layers)
    assert factor is not None
    logits_LTE, noise_LTE = (t.detach().repeat(layers, 1, 1) for t in (skewed(1), randn(1, T, E, key=("noise",))))
    case = worth.Case(logits_LTE, noise_LTE)
    original, ours = worth.theirs(convention, case, k), worth.ours(convention.like, case, k)
    assert ours is not None
    (theirs,) = torch.autograd.grad(0.01 * original.value, original.logits_LTE)
    (mine,) = torch.autograd.grad(0.01 * factor * ours.value, ours.logits_LTE)
    if convention.like == "importance" and k == 1:  # the weight of one expert is 1, whatever the logits
        assert not theirs.abs().max() > 1e-15 and not mine.abs().max() > 1e-15
        return
    close({"gradient": (mine, theirs)}, FP32)  # our shares of counts are fp32


def test_two_layers_that_use_different_halves_read_as_balanced_where_layers_are_pooled():
    cases = worth.situations(8, 2, 4096, 2, seed=0)
    halves, balanced = (conventions.hf_mixtral(cases[name].logits_LTE, 2).item() for name in ("halves", "balanced"))
    assert halves == pytest.approx(balanced, rel=1e-3)
    ours = {name: worth.ours("switch", case, 2) for name, case in cases.items()}
    assert ours["halves"] and ours["balanced"]
    assert ours["halves"].value.item() == pytest.approx(2 * ours["balanced"].value.item(), rel=1e-3)


def test_the_spread_of_conventions_that_was_measured():
    """Values at balance and at a collapse onto two of eight experts, and who is above whom in between, as measured by
    running each (4096 tokens, k=2): 2.00 / 4.17 / 8.00 for transformers, 1.00 / 2.09 / 4.00 for OLMo-core and LibMoE,
    2.00 / 4.99 / 8.00 for nanoMoE, 1.00 / 2.66 / 6.09 for st-moe. Other logits: directions alone are comparable."""
    z = worth.situations(8, 2, 4096, 1, seed=0)

    def value(f: Callable[[Tensor, int, int], Tensor], situation: str) -> float:
        return f(z[situation].logits_LTE, 2, 1).item()

    measured = {
        conventions.hf_mixtral: (2, 8),
        conventions.olmo_core: (1, 4),
        conventions.libmoe: (1, 4),
        conventions.nano_moe: (2, 8),
        conventions.first_choice: (1, None),
    }
    for f, (balanced, collapsed) in measured.items():
        assert value(f, "balanced") == pytest.approx(balanced, rel=1e-3)
        assert value(f, "balanced") < value(f, "skewed") < value(f, "collapse")
        assert collapsed is None or value(f, "collapse") == pytest.approx(collapsed, rel=1e-3)
    by_skew = (conventions.olmo_core, conventions.first_choice, conventions.hf_mixtral, conventions.nano_moe)
    at_skew = [value(f, "skewed") for f in by_skew]
    assert at_skew == sorted(at_skew)


def test_no_loss_of_this_family_wakes_a_dead_expert():
    """20 logits down, f P and CV^2 leave it a millionth of what they do to skewed logits; nanoMoE exactly nothing."""
    z = worth.situations(8, 2, 512, 1, seed=0)
    family = (conventions.hf_mixtral, conventions.first_choice, conventions.shazeer_importance, conventions.nano_moe)
    for convention in (c for c in CONVENTIONS if c.value in family or c.noisy):
        dead, steep = (worth.measure(worth.theirs(convention, z[name], 2)) for name in ("collapse", "skewed"))
        assert dead.dead is not None and dead.dead < 1e-6 * steep.gradient
        assert dead.dead == 0 or convention.value is not conventions.nano_moe
