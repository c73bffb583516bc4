"""Gate function, order of gate and top-k, renormalising, and scoring: values and gradients, and what is equal to what.

Shapes: T tokens, D width, E experts, K chosen per token.
"""

import itertools
from typing import Any

import pytest
import torch
import yaml
from layers import CONF, context, dense_weights, grad, make_router, preset, randn
from oracles import scored as oracle
from peers import BF16, FP32, FP64, close, hf, hf_config, set_weights
from torch import Tensor

from moe_lab.config import registered
from moe_lab.observe.remedies import remedies
from moe_lab.routing import Router

T, D, E = 12, 8, 5
GATES, ORDERS = ("softmax", "sigmoid", "normalised_sigmoid"), ("gate_first", "topk_first")
OPTIONS = [
    {"gate": gate, "order": order, "renormalise": renormalise}
    for gate, order, renormalise in itertools.product(GATES, ORDERS, (False, True))
]
every_gate = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))


def gated(k: int, **options: Any) -> Router:
    return make_router(preset("router", "topk", k=k, **options), D, E)


def weights_and_gradient(router: Router, x_TD: Tensor, **told: Any) -> tuple[Tensor, Tensor]:
    """Combine weights [T, E] and, for a fixed gradient at each, that of the router's rows."""
    weight_TE = dense_weights(router(x_TD, context(**told)).plan)
    (weight_TE * randn(len(x_TD), E, key=("c",))).sum().backward()
    return weight_TE.detach(), grad(router.get_parameter("weight_ED"))


@every_gate
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("biased", [False, True])
def test_against_loops(options: dict[str, Any], k: int, biased: bool):
    """At a temperature, which acts on the weights alone, and with a bias that changes choices."""
    router, x_TD = gated(k, **options), randn(T, D)
    bias_E = 0.3 * randn(E, key=("bias",)) if biased else None
    mine_TE, gradient = weights_and_gradient(router, x_TD, bias_E=bias_E, temperature=0.5)

    row_ED = router.get_parameter("weight_ED").detach().clone().requires_grad_()
    expected_TE = torch.zeros(T, E, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        scores = [oracle.linear_score(x_TD[t], row) for row in row_ED]
        bias = None if bias_E is None else bias_E.tolist()
        for e, w in oracle.gated(scores, k, **options, temperature=0.5, bias=bias).items():
            expected_TE[t, e] = w.detach()
            total = total + w * randn(T, E, key=("c",))[t, e]
    total.backward()
    torch.testing.assert_close(mine_TE, expected_TE, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, grad(row_ED), rtol=1e-9, atol=1e-13)


SAME = {
    "among chosen, softmax": [
        {"gate": "softmax", "order": "gate_first", "renormalise": True},
        {"gate": "softmax", "order": "topk_first", "renormalise": False},
        {"gate": "softmax", "order": "topk_first", "renormalise": True},
    ],
    "among chosen, sigmoid": [
        {"gate": "sigmoid", "order": "gate_first", "renormalise": True},
        {"gate": "sigmoid", "order": "topk_first", "renormalise": True},
        {"gate": "normalised_sigmoid", "order": "gate_first", "renormalise": True},
        {"gate": "normalised_sigmoid", "order": "topk_first", "renormalise": False},
        {"gate": "normalised_sigmoid", "order": "topk_first", "renormalise": True},
    ],
    "sigmoid alone": [
        {"gate": "sigmoid", "order": "gate_first", "renormalise": False},
        {"gate": "sigmoid", "order": "topk_first", "renormalise": False},
    ],
    "over all, softmax": [{"gate": "softmax", "order": "gate_first", "renormalise": False}],
    "over all, sigmoid": [{"gate": "normalised_sigmoid", "order": "gate_first", "renormalise": False}],
}


def test_the_groups_are_equal_within_and_different_between():
    assert sorted(map(str, itertools.chain(*SAME.values()))) == sorted(map(str, OPTIONS))
    x_TD, firsts = randn(T, D), []
    for spellings in SAME.values():
        results = [weights_and_gradient(gated(2, **options), x_TD) for options in spellings]
        for weight_TE, gradient in results[1:]:
            torch.testing.assert_close(weight_TE, results[0][0], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(gradient, results[0][1], rtol=1e-9, atol=1e-13)
        firsts.append(results[0])
    for one, other in itertools.combinations(firsts, 2):
        assert (one[0] - other[0]).abs().max() > 1e-2 and (one[1] - other[1]).abs().max() > 1e-2


@every_gate
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("experts", [1, E])
def test_rows_that_get_a_gradient(options: dict[str, Any], k: int, experts: int):
    """Of one token: the rows that `traits` names, and no others. A row is dead below 1e-14 of what it multiplies."""
    node = preset("router", "topk", k=min(k, experts), **options)
    router, x_TD = make_router(node, D, experts), randn(1, D)
    plan = router(x_TD, context()).plan
    (dense_weights(plan) * randn(1, experts, key=("c",))).sum().backward()
    reached = grad(router.get_parameter("weight_ED")).abs().amax(-1) > 1e-14
    traits = registered("router")["topk"].traits(node, experts)
    chosen = torch.zeros(experts, dtype=torch.bool).index_fill(0, plan.selected_TK[0], True)
    expected = {"all": torch.ones_like(chosen), "selected": chosen, "none": torch.zeros_like(chosen)}[traits.rows]
    assert torch.equal(reached, expected) and traits.live == bool(reached.any())


@every_gate
@pytest.mark.parametrize("name", ["topk", "switch", "noisy_topk", "sinkhorn"])
def test_the_first_remedy_for_a_frozen_router_revives_it(options: dict[str, Any], name: str):
    node = preset("router", name, k=1, **options)
    router = registered("router")[name]
    if router.traits(node, E).live:
        return
    first = remedies("frozen", 0.0, 0, {"router": node})[0]
    assert first.endswith("(a renormalised top-1 weight is always 1)")
    words = [word.removeprefix("router.").split("=") for word in first.split(" (")[0].split()]
    changes = {name: yaml.safe_load(value) for name, value in words}
    assert set(changes) <= set(node) and router.traits(node | changes, E).live


def test_presets_are_the_papers():
    """Mixtral renormalises, Switch does not, DeepSeek-V3 takes sigmoids: one class, three defaults."""
    shown = {
        name: (node["gate"], node["order"], node["renormalise"], node["k"])
        for name in ("topk", "switch", "sigmoid_topk")
        for node in [preset("router", name)]
    }
    assert shown == {
        "topk": ("softmax", "gate_first", True, 2),
        "switch": ("softmax", "gate_first", False, 1),
        "sigmoid_topk": ("sigmoid", "gate_first", True, 2),
    }


@pytest.mark.parametrize("options", SAME["among chosen, softmax"], ids=str)
def test_gpt_oss_and_jetmoe_choose_first(options: dict[str, Any]):
    """Both take the k largest logits and then a softmax; JetMoE's gate is fp32."""
    k, x_TD, c_TE = 3, randn(T, D), randn(T, E, key=("c",))
    router = gated(k, **options)
    weight_TE, gradient = weights_and_gradient(router, x_TD)

    theirs = hf("gpt_oss").GptOssTopKRouter(
        hf_config("GptOssConfig", hidden_size=D, num_local_experts=E, num_experts_per_tok=k)
    )
    theirs = theirs.double()
    set_weights({theirs.weight: router.weight_ED, theirs.bias: torch.zeros(E)})
    _, scores_TK, chosen_TK = theirs(x_TD)
    their_TE = torch.zeros(T, E, dtype=torch.float64).scatter(1, chosen_TK, scores_TK)
    (their_TE * c_TE).sum().backward()
    close({"weights": (weight_TE, their_TE), "gradient": (gradient, grad(theirs.weight))}, FP64)

    gating = hf("jetmoe").JetMoeTopKGating(D, E, k).double()
    set_weights({gating.layer.weight: router.weight_ED})
    order_N, token_N, gates_N, sizes_E, _ = gating(x_TD)
    expert_N = torch.repeat_interleave(torch.arange(E), torch.tensor(sizes_E))
    assert torch.equal(token_N, order_N // k)
    their_TE = torch.zeros(T, E, dtype=torch.float64).index_put((token_N, expert_N), gates_N)
    (their_TE * c_TE).sum().backward()
    close({"weights": (weight_TE, their_TE), "gradient": (gradient, grad(gating.layer.weight))}, FP32)


@pytest.mark.parametrize("options", SAME["among chosen, sigmoid"][2:], ids=str)
def test_deepseek_v3_is_a_normalised_sigmoid_among_the_chosen(options: dict[str, Any]):
    """Without a bias, that is: it is added to sigmoids there, and here to whatever the gate is."""
    config = hf_config(
        "DeepseekV3Config",
        hidden_size=D,
        n_routed_experts=E,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
    )
    theirs = hf("deepseek_v3").DeepseekV3TopkRouter(config)
    torch.nn.init.zeros_(theirs.weight)
    router, x_TD = gated(2, **options), randn(T, D)
    set_weights({theirs.weight: router.weight_ED})
    weight_TE, gradient = weights_and_gradient(router, x_TD)
    _, weight_TK, chosen_TK = theirs(x_TD)
    their_TE = torch.zeros(T, E).scatter(1, chosen_TK, weight_TK)
    (their_TE * randn(T, E, key=("c",))).sum().backward()
    close({"weights": (weight_TE, their_TE), "gradient": (gradient, grad(theirs.weight))}, FP32)


PRESETS = sorted(path.stem for path in (CONF / "router").glob("*.yaml"))
SCORED = [name for name in PRESETS if "scoring" in preset("router", name)]


def test_all_but_those_without_scores_to_learn_take_mlp_scoring():
    assert set(PRESETS) - set(SCORED) == {"dselect_k", "hash", "kmeans", "random", "soft_moe"}


def scored_by_mlp(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Router, Tensor, Tensor]:
    """A router, its hidden layer D wide (a quarter of the width of the tokens), and tokens [T, 4 D]."""
    router = make_router(preset("router", name, scoring="mlp", **options), 4 * D, E, dtype)
    hidden_XD = router.get_parameter("hidden_XD")
    assert hidden_XD.shape == (D, 4 * D)
    return router, hidden_XD, randn(T, 4 * D)


@pytest.mark.parametrize("name", SCORED)
def test_mlp_scoring_puts_a_hidden_layer_before_the_rows(name: str):
    """The linear router on silu(H x) is the mlp router on x: scores and gradients, by loops over neurons."""
    router, hidden_XD, x_TD = scored_by_mlp(name)
    linear = make_router(preset("router", name, scoring="linear"), D, E)
    theirs_TD, their_XD = x_TD.clone().requires_grad_(), hidden_XD.detach().clone().requires_grad_()
    hidden_TX = torch.stack([oracle.mlp_hidden(x, their_XD) for x in theirs_TD])
    mine_TE = router(x_TD.requires_grad_(), context()).logits_TE
    their_TE = linear(hidden_TX, context()).logits_TE
    (mine_TE * randn(T, E, key=("c",))).sum().backward()
    (their_TE * randn(T, E, key=("c",))).sum().backward()
    pairs = {"scores": (mine_TE, their_TE), "x": (grad(x_TD), grad(theirs_TD))}
    close(pairs | {"hidden": (grad(hidden_XD), grad(their_XD))}, FP64)
    assert router.directions_ED() is None, "its rows are no directions of the token's space"


@pytest.mark.parametrize("name", SCORED)
def test_mlp_scoring_of_bf16_tokens(name: str):
    """The hidden layer runs in bf16, scores are fp32; scores and gradients are near those of the tokens in fp32."""
    # A cosine's gradient grows without bound near the origin, and in its default's two dimensions a token is there.
    options = {"latent": D} if name == "cosine" else {}
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        router, hidden_XD, x_TD = scored_by_mlp(name, torch.float32, **options)
        kept: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((*t.shape, t.dtype)) or t, lambda t: t):  # noqa: B023
            x_TD = x_TD.bfloat16().to(dtype).requires_grad_()
            logits_TE = router(x_TD, context()).logits_TE
        assert (T, D, dtype) in kept, "what goes into the activation"
        assert logits_TE.dtype == torch.float32
        (logits_TE * randn(T, E, key=("c",))).sum().backward()
        found.append((logits_TE.detach(), grad(x_TD), grad(hidden_XD)))
    close(dict(zip(("scores", "x", "hidden"), zip(*found, strict=True), strict=True)), BF16)
