"""Runs with experts that differ, through the command line, and what observers say of them.

Shapes: T tokens, D width, E experts, K chosen, F neurons.
"""

import math
from pathlib import Path

import pytest
import torch
from edges import run
from layers import context, make_router, preset, randn
from torch import Tensor

from moe_lab import seeding
from moe_lab.config import build
from moe_lab.model.experts import Experts
from moe_lab.model.moe import MoE
from moe_lab.observe.geometry import coupling
from moe_lab.observe.probe import Probe, mean_activation
from moe_lab.observe.recorder import layer_coupling
from moe_lab.observe.window import View

D = 16
RUNS = {
    "fine": ["router=topk", "experts.granularity=4"],
    "narrow": ["router=topk", "experts.widths=[8,16]", "experts=mlp"],
    "narrow and fine": ["router=topk", "experts.widths=[8,16]", "experts.granularity=2", "experts.capacity_factor=1.0"],
    "MoE++": ["router=topk", "experts.zero_experts=1", "experts.copy_experts=1", "experts.constant_experts=2"],
    "MoE++ in full": [
        "router=dense",
        "experts.zero_experts=1",
        "experts.constant_experts=1",
        "experts.shared_experts=1",
    ],
    "coupled": ["router=topk", "experts.widths=[8,16]", "experts.zero_experts=1", "balance=[erc,orthogonal_experts]"],
    "by the data": ["router=top_p", "experts.zero_experts=1", "experts.copy_experts=1"],
    "upcycled": ["router=topk", "experts.init=upcycled", "experts.init_noise=0.01", "balance=[switch,loss_free]"],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_expert_trains(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the end and whole, every value defined, the load told for every expert there is."""
    monkeypatch.chdir(tmp_path)
    ran = run(*RUNS[name], f"dtype={dtype}")
    # Of an expert that no token chose; where all experts shape a token, none is dead.
    assert ran.undefined() <= {"expert_loss", *(["dead_experts"] if "router=dense" in RUNS[name] else [])}
    told = ran.summary["cost"]
    assert {len(loads) for loads in ran.each("selected")} == {told["experts"]}
    assert told["useful_flops_per_token"] <= told["flops_per_token"]


def test_one_network_among_experts_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("router=topk", "experts.num=1", "experts.zero_experts=2", "router.k=1")
    of_one = {"coupling_mismatched", "coupling_gap", "coupling_signed_mismatched", "coupling_signed_gap"}
    of_one |= {"coupling_z", "coupling_signed_z"}
    assert of_one <= ran.undefined() <= of_one | {"score_act_pearson", "score_act_spearman", "expert_loss"}


def bank(kind: str, **changes: object) -> Experts:
    experts: Experts = build("experts", preset("experts", kind, **changes), D, 2)
    seeding.initialise(experts, 3)
    return experts.double()


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_coupling_counts_no_padding(kind: str) -> None:
    """The mean over experts of what each alone would give, the router rows of experts without a network left out."""
    experts = bank(kind, num=4, widths=[8, 24], copy_experts=2)
    moe = MoE(make_router(preset("router", "topk"), D, 6), experts, 2)
    found, router_ED = layer_coupling(moe), moe.router.directions_ED()
    assert router_ED is not None
    cosine_EG = torch.zeros(4, 4, dtype=torch.float64)
    for e in range(4):
        for g, width in enumerate((8, 24, 8, 24)):
            neurons_FD = experts.w_in_EID[g, :width]
            cosine_EG[e, g] = torch.cosine_similarity(router_ED[e : e + 1], neurons_FD, -1).abs().mean()
    matched = cosine_EG.diagonal().mean()
    mismatched = cosine_EG[~torch.eye(4, dtype=torch.bool)].mean()
    assert found["coupling_matched"].item() == pytest.approx(matched.item())
    assert found["coupling_mismatched"].item() == pytest.approx(mismatched.item())


def test_a_neuron_of_zeros_is_no_padding() -> None:
    """It has no direction, and its expert none that could be told."""
    experts = bank("mlp", num=2, widths=[8, 16])
    with torch.no_grad():
        experts.w_in_EID[0, 3] = 0
    found = coupling(randn(2, D), experts.read_in_EFD(), experts.real_EF)
    assert found["coupling_matched"].isfinite()
    experts.w_in_EID.data[1, 3] = 0
    assert coupling(randn(2, D), experts.read_in_EFD(), experts.real_EF)["coupling_matched"].isnan()


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_activations_are_those_of_the_neurons_there_are(kind: str) -> None:
    experts = bank(kind, num=4, widths=[8, 24], zero_experts=1)
    moe = MoE(make_router(preset("router", "topk"), D, 5), experts, 2)
    x_TD = randn(9, D)
    selected_TK = torch.tensor([[0, 1], [4, 2], [3, 4], [5, 5], [1, 5], [2, 0], [3, 1], [4, 5], [0, 3]])  # 5: none
    act = torch.nn.functional.gelu if kind == "mlp" else torch.nn.functional.silu
    got_TK = mean_activation(moe, x_TD, selected_TK).view(9, 2)
    for t, chosen in enumerate(selected_TK.tolist()):
        for k, e in enumerate(chosen):
            if e >= 4:
                assert got_TK[t, k].isnan()
            else:
                expected = act(experts.w_in_EID[e, : (8, 24)[e % 2]] @ x_TD[t]).mean()
                torch.testing.assert_close(got_TK[t, k], expected)


def test_scores_against_activations_where_no_choice_has_any() -> None:
    """All tokens choose experts without a network: undefined, and no number made up."""
    moe = MoE(make_router(preset("router", "topk", k=1), D, 2), bank("mlp", num=1, width=8, zero_experts=1), 2)
    x_TD = randn(8, D)
    _, routing = moe(x_TD, context())
    for expert, defined in ((0, True), (1, False)):
        plan = type(routing.plan)(torch.full((8, 1), expert), torch.ones(8, 1), 2)
        v = type(routing)(plan, routing.logits_TE, routing.probs_TE)
        probe = Probe([moe])
        probe.see(View((v,), (x_TD,), zeros(8), zeros(8), 8, torch.zeros(8)))
        (found,) = probe.row()["moe/score_act_pearson"]
        assert (found is not None and math.isfinite(found)) == defined


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)
