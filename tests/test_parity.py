"""Routers, experts and losses against independent implementations, values and gradients, on the same weights.

transformers 5 (OLMoE, Mixtral, Switch, DeepSeek-V3, GPT-OSS), st-moe-pytorch 0.1.8 and torch's gumbel_softmax.
The layers run in float64. Where a peer computes its gate in fp32 whatever the model's dtype, the tolerance is that of
fp32: an error of 1e-5 of the largest value; elsewhere it is 1e-10.

Shapes: B batch, S sequence, T = B*S tokens, D width, F hidden, E experts, K chosen per token.
"""

import importlib
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as nnF
from layers import context, dense_weights, grad, make_moe, make_router, preset, randn
from torch import Tensor, nn

from moe_lab.balance.base import Balancer, mean_over_layers
from moe_lab.config import build
from moe_lab.model.moe import MoE
from moe_lab.routing import Assignments, Context, Routing

B, S, D, F, E = 2, 24, 16, 24, 6
T = B * S
FP32, FP64 = 1e-5, 1e-10


@pytest.fixture(scope="module")
def hf() -> Any:
    """transformers, and its model files by name: only imported when a test of this file runs."""

    class Models:
        @staticmethod
        def config(name: str, **options: Any) -> Any:
            config = getattr(importlib.import_module("transformers"), name)(**options)
            config._experts_implementation = "eager"
            return config

        @staticmethod
        def model(name: str) -> Any:
            return importlib.import_module(f"transformers.models.{name}.modeling_{name}")

    return Models


@pytest.fixture(scope="module")
def st_moe() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that it imports
        return importlib.import_module("st_moe_pytorch.st_moe_pytorch")


def close(pairs: dict[str, tuple[Tensor, Tensor]], tolerance: float) -> None:
    for name, (got, expected) in pairs.items():
        assert got.shape == expected.shape, name
        assert expected.abs().max() > 0, f"{name}: nothing to compare"
        error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest value"


def set_weights(pairs: dict[Tensor, Tensor]) -> None:
    with torch.no_grad():
        for to, source in pairs.items():
            to.copy_(source)


def copy_gated(ours: MoE, block: Any) -> None:
    """Our [E, D, gate then up] and [E, F, D] are their [E, gate then up, D] and [E, D, F]."""
    set_weights(
        {
            block.gate.weight: ours.router.weight_ED,
            block.experts.gate_up_proj: ours.experts.w_in_EDI.transpose(1, 2),
            block.experts.down_proj: ours.experts.w_out_EFD.transpose(1, 2),
        }
    )


def run_both(ours: MoE, block: Any, ctx: Context) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs and gradients by x, router and experts of a gated layer and of its Hugging Face twin."""
    x, c = randn(B, S, D).requires_grad_(), randn(B, S, D, key=("c",))
    x_TD = x.detach().view(T, D).requires_grad_()
    y_TD, _ = ours(x_TD, ctx)
    theirs = block(x)
    (y_TD * c.view(T, D)).sum().backward()
    (theirs * c).sum().backward()
    return {
        "output": (y_TD, theirs.view(T, D)),
        "gradient of x": (grad(x_TD), grad(x).view(T, D)),
        "gradient of the router": (grad(ours.router.weight_ED), grad(block.gate.weight)),
        "gradient of w_in": (grad(ours.experts.w_in_EDI), grad(block.experts.gate_up_proj).transpose(1, 2)),
        "gradient of w_out": (grad(ours.experts.w_out_EFD), grad(block.experts.down_proj).transpose(1, 2)),
    }


@pytest.mark.parametrize("k", [1, 2, 4])
def test_olmoe_block(hf: Any, k: int):
    """topk without renormalising: OLMoE's own setting; its gate is an fp32 softmax."""
    options = {"hidden_size": D, "intermediate_size": F, "num_experts": E, "num_experts_per_tok": k}
    block = hf.model("olmoe").OlmoeSparseMoeBlock(hf.config("OlmoeConfig", norm_topk_prob=False, **options)).double()
    ours = make_moe(preset("router", "topk", k=k, renormalise=False), D, E, width=F)
    copy_gated(ours, block)
    close(run_both(ours, block, context()), FP32)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_renormalised_blocks(hf: Any, name: str, k: int):
    """topk renormalised: Mixtral, and OLMoE with norm_topk_prob; both gates are fp32 softmaxes.

    k=1 is left out: the true gradient of the router is zero there, and both only show its rounding."""
    options: dict[str, Any] = {"hidden_size": D, "intermediate_size": F, "num_experts_per_tok": k}
    if name == "olmoe":
        config = hf.config("OlmoeConfig", num_experts=E, norm_topk_prob=True, **options)
        block = hf.model("olmoe").OlmoeSparseMoeBlock(config).double()
    else:
        config = hf.config("MixtralConfig", num_local_experts=E, **options)
        block = hf.model("mixtral").MixtralSparseMoeBlock(config).double()
    ours = make_moe(preset("router", "topk", k=k), D, E, width=F)
    copy_gated(ours, block)
    close(run_both(ours, block, context()), FP32)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_deepseek_v3_block(hf: Any, renormalise: bool, biased: bool):
    """sigmoid_topk with two shared experts, one group, no scaling factor; scores are fp32. e_score_correction_bias is
    our selection bias: large enough here to change many choices, and in no weight."""
    config = hf.config(
        "DeepseekV3Config",
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=2,
        routed_scaling_factor=1.0,
        norm_topk_prob=renormalise,
    )
    block = hf.model("deepseek_v3").DeepseekV3MoE(config).double()
    node = preset("router", "sigmoid_topk", renormalise=renormalise)
    ours = make_moe(node, D, E, width=F, shared_experts=2)
    copy_gated(ours, block)
    shared = block.shared_experts
    assert ours.shared is not None
    set_weights({shared.down_proj.weight: ours.shared.w_out_FD.T})
    gate_DF, up_DF = ours.shared.w_in_DI.chunk(2, -1)
    set_weights({shared.gate_proj.weight: gate_DF.T, shared.up_proj.weight: up_DF.T})
    bias_E = 0.3 * randn(E, key=("bias",)) if biased else torch.zeros(E, dtype=torch.float64)
    set_weights({block.gate.e_score_correction_bias: bias_E})

    pairs = run_both(ours, block, context(bias_E=bias_E))
    theirs_DI = torch.cat([grad(shared.gate_proj.weight).T, grad(shared.up_proj.weight).T], -1)
    pairs["gradient of the shared w_in"] = (grad(ours.shared.w_in_DI), theirs_DI)
    close(pairs, FP32)
    if biased:
        moved = [ours.router(randn(T, D), context(bias_E=b)).plan.selected_E for b in (bias_E, None)]
        assert not torch.equal(*moved), "the bias changes nothing: it proves nothing"


@pytest.mark.parametrize("capacity", [3, 5, 100])
def test_switch_block_and_its_capacity(hf: Any, capacity: int):
    """Top-1 scaled by its probability, tokens beyond an expert's capacity dropped, first come in token order.

    Theirs counts capacity per sequence, ours over the batch: one sequence makes them the same. It never takes float64
    from a config, but follows its dtype attribute. Their activation is set to our GELU."""
    options = {"d_model": D, "d_ff": F, "num_experts": E, "dropout_rate": 0.0, "dense_act_fn": "gelu"}
    config = hf.config("SwitchTransformersConfig", expert_capacity=capacity, **options)
    block = hf.model("switch_transformers").SwitchTransformersSparseMLP(config).double().eval()
    block.router.dtype = torch.float64
    factor = capacity * E / T
    ours = make_moe(preset("router", "switch"), D, E, "mlp", width=F, capacity_factor=factor)
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    set_weights({block.router.classifier.weight: ours.router.weight_ED})
    for e, expert in enumerate(experts):
        set_weights({expert.wi.weight: ours.experts.w_in_EDI[e].T, expert.wo.weight: ours.experts.w_out_EFD[e].T})

    x_TD, c_TD = randn(T, D).requires_grad_(), randn(T, D, key=("c",))
    x_1TD = x_TD.detach()[None].requires_grad_()
    y_TD, routing = ours(x_TD, context())
    theirs = block(x_1TD)[0]
    (y_TD * c_TD).sum().backward()
    (theirs * c_TD).sum().backward()
    zero = torch.zeros_like  # an expert that nothing reached has no gradient there
    w_in = torch.stack([zero(m.wi.weight) if m.wi.weight.grad is None else m.wi.weight.grad for m in experts])
    w_out = torch.stack([zero(m.wo.weight) if m.wo.weight.grad is None else m.wo.weight.grad for m in experts])
    close(
        {
            "output": (y_TD, theirs),
            "gradient of x": (grad(x_TD), grad(x_1TD)[0]),
            "gradient of the router": (grad(ours.router.weight_ED), grad(block.router.classifier.weight)),
            "gradient of w_in": (grad(ours.experts.w_in_EDI), w_in.transpose(1, 2)),
            "gradient of w_out": (grad(ours.experts.w_out_EFD), w_out.transpose(1, 2)),
        },
        FP64,
    )
    plan, mask = routing.plan, block.router(x_1TD)[0][0]
    assert torch.equal(plan.kept_E, mask.sum(0))
    assert int(plan.kept_E.sum()) < T or capacity == 100


def test_gpt_oss_router(hf: Any):
    """Softmax over the chosen logits is our renormalised softmax over all."""
    config = hf.config("GptOssConfig", hidden_size=D, num_local_experts=E, num_experts_per_tok=3)
    theirs = hf.model("gpt_oss").GptOssTopKRouter(config).double()
    ours = make_router(preset("router", "topk", k=3), D, E)
    set_weights({theirs.weight: ours.weight_ED, theirs.bias: torch.zeros(E)})
    x_TD, c_TE = randn(T, D), randn(T, E, key=("c",))
    _, scores_TK, chosen_TK = theirs(x_TD)
    weight_TE = torch.zeros(T, E, dtype=torch.float64).scatter(1, chosen_TK, scores_TK)
    mine_TE = dense_weights(ours(x_TD, context()).plan)
    (weight_TE * c_TE).sum().backward()
    (mine_TE * c_TE).sum().backward()
    close({"weights": (mine_TE, weight_TE), "gradient": (grad(ours.weight_ED), grad(theirs.weight))}, FP64)


# Losses. `routing_of` is a top-k softmax routing of given logits, without a router.


def routing_of(logits_TE: Tensor, k: int) -> Routing:
    probs_TE = logits_TE.softmax(-1)
    top = probs_TE.topk(k, -1)
    return Routing(Assignments(top.indices, top.values, logits_TE.shape[-1]), logits_TE, probs_TE)


def skewed(*key: str) -> Tensor:
    """Logits that prefer the first experts."""
    return (1.5 * randn(T, E, key=key) + torch.linspace(2, -2, E)).requires_grad_()


def balancer(name: str) -> Balancer:
    return build("balance", {"name": name})


def close_losses(ours: Tensor, theirs: Tensor, by: Tensor, tolerance: float) -> None:
    (mine,), (other,) = (torch.autograd.grad(loss, by, retain_graph=True) for loss in (ours, theirs))
    close({"value": (ours, theirs), "gradient": (mine, other)}, tolerance)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_load_balancing_loss_of_one_layer(hf: Any, name: str, k: int):
    """Theirs counts k assignments per token and does not divide by k: k at balance. Its sums are fp32."""
    logits_TE = skewed()
    theirs = hf.model(name).load_balancing_loss_func((logits_TE,), E, k)
    ours = balancer("switch").loss(routing_of(logits_TE, k))
    assert float(ours.detach()) > 1.1
    close_losses(k * ours, theirs, logits_TE, FP32)


def test_load_balancing_loss_of_two_layers_differs_and_should(hf: Any):
    """Complementary halves dead: theirs pools the layers and reads k, its value at balance; ours reads 2."""
    dead = torch.full((E,), -30.0, dtype=torch.float64)
    dead[: E // 2] = 0
    layers = tuple(randn(T, E, key=(str(i),)) * 1e-3 + mask for i, mask in enumerate((dead, dead.flip(0))))
    theirs = hf.model("mixtral").load_balancing_loss_func(layers, E, 2)
    assert float(theirs) == pytest.approx(2, abs=0.01)
    ours = mean_over_layers(balancer("switch"), [routing_of(logits_TE, 2) for logits_TE in layers])
    assert float(ours) == pytest.approx(2, abs=0.01)
    assert float(ours) / float(theirs / 2) == pytest.approx(2, abs=0.02), "theirs, per k, says all is well"


def test_switch_losses(hf: Any):
    model = hf.model("switch_transformers")
    logits_TE = skewed()
    routing = routing_of(logits_TE, 1)
    theirs = model.load_balancing_loss_func(routing.probs_TE[None], routing.plan.selected_TK.T)
    close_losses(balancer("switch").loss(routing), theirs, logits_TE, FP32)  # its counts are fp32
    close_losses(balancer("z_loss").loss(routing), model.router_z_loss_func(logits_TE[None]), logits_TE, FP64)


def gating(st_moe: Any, k: int) -> Any:
    """Its gate with room for all and a threshold that sends every token to all of its k experts."""
    return st_moe.TopNGating(D, E, top_n=k, threshold_train=0.0, capacity_factor_train=float(E)).double()


@pytest.mark.parametrize("k", [2, 3])
def test_st_moe_gate_and_losses(st_moe: Any, k: int):
    """Its combine tensor, summed over slots, is topk renormalised. Its balance loss is that of the first choices only,
    so it is compared with our switch loss of a top-1 choice, not with that of k. Its z-loss is ours.

    Not comparable: top-1 (it asks for 2 or more), its random second expert (off here), and capacity, where it serves
    all first choices before any second and we go by token."""
    gate = gating(st_moe, k)
    ours = make_router(preset("router", "topk", k=k), D, E)
    set_weights({gate.to_gates.weight: ours.weight_ED})
    x_TD, c_TE = randn(T, D), randn(T, E, key=("c",))
    _, combine, balance, z = gate(x_TD[None])
    routing = ours(x_TD, context())
    weight_TE = dense_weights(routing.plan)
    top1 = routing_of(routing.logits_TE, 1)
    pairs = {
        "weights": (weight_TE, combine.sum(-1)[0]),
        "balance": (balancer("switch").loss(top1), balance),
        "z": (balancer("z_loss").loss(routing), z),
    }
    close(pairs, FP64)
    for name, (mine, theirs) in pairs.items():
        c = c_TE if mine.ndim else torch.tensor(1.0)
        (a,) = torch.autograd.grad((mine * c).sum(), ours.weight_ED, retain_graph=True)
        (b,) = torch.autograd.grad((theirs * c).sum(), gate.to_gates.weight, retain_graph=True)
        close({f"gradient of {name}": (a, b)}, FP64)


def test_st_moe_layer(st_moe: Any):
    """The whole layer with our experts in its slots. Its straight-through dispatch is another estimator: off."""
    ours = make_moe(preset("router", "topk"), D, E, "mlp", width=F)

    class Expert(nn.Module):
        def __init__(self, e: int):
            super().__init__()
            self.w_in = nn.Parameter(ours.experts.w_in_EDI[e].detach().clone())
            self.w_out = nn.Parameter(ours.experts.w_out_EFD[e].detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return nnF.gelu(x @ self.w_in) @ self.w_out

    experts = nn.ModuleList([Expert(e) for e in range(E)])
    layer = st_moe.MoE(D, E, experts=experts, straight_through_dispatch_tensor=False)
    layer.gate = gating(st_moe, 2)
    layer.gate.straight_through_dispatch_tensor = False
    layer = layer.double()
    set_weights({layer.gate.to_gates.weight: ours.router.weight_ED})
    x_TD, c_TD = randn(T, D), randn(T, D, key=("c",))
    y_TD, theirs = ours(x_TD, context())[0], layer(x_TD[None]).outputs[0]
    (y_TD * c_TD).sum().backward()
    (theirs * c_TD).sum().backward()
    close(
        {
            "output": (y_TD, theirs),
            "gradient of the router": (grad(ours.router.weight_ED), grad(layer.gate.to_gates.weight)),
            "gradient of w_in": (
                grad(ours.experts.w_in_EDI),
                torch.stack([grad(m.w_in) for m in layer.experts.experts]),
            ),
        },
        FP64,
    )


# torch's gumbel_softmax draws -log(Exp(1)) from the global stream; the same draws are handed to our routers.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("form", ["soft", "dense", "selected"])
def test_gumbel_softmax(form: str, temperature: float):
    """Soft: gumbel_softmax. Hard, backward=dense: gumbel_ste in value and gradient. backward=selected hands on the
    gradient of the chosen column alone. torch's hard form returns y - y' + y' and is 1 only up to rounding."""
    logits_TE, c_TE = randn(T, E), randn(T, E, key=("c",))
    if form == "soft":
        router = make_router(preset("router", "gumbel_softmax"), E, E)
    else:
        router = make_router(preset("router", "gumbel_ste", backward=form), E, E)
    set_weights({router.weight_ED: torch.eye(E)})
    mine_in, theirs_in = logits_TE.clone().requires_grad_(), logits_TE.clone().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        noise_TE = -torch.empty_like(logits_TE).exponential_().log()
        torch.manual_seed(7)
        theirs = nnF.gumbel_softmax(theirs_in, tau=temperature, hard=form != "soft")
    mine = dense_weights(router(mine_in, context(noise_TE, temperature=temperature)).plan)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    chosen_TE = mine.detach() if form == "selected" else torch.ones(T, E)
    (mine * c_TE).sum().backward()
    (theirs * c_TE * chosen_TE).sum().backward()
    close({"gradient": (grad(mine_in), grad(theirs_in))}, FP64)
