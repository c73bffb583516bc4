"""Whole MoE layers against independent implementations, values and gradients, on the same weights.

OLMoE, Mixtral, Switch, DeepSeek-V3 and GPT-OSS of transformers 5, and st-moe-pytorch 0.1.8. The layers run in float64.
Where a peer computes its gate in fp32 whatever the model's dtype, the tolerance is that of fp32.

Shapes: B batch, S sequence, T = B*S tokens, D width, F hidden, E experts, K chosen per token.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as nnF
from layers import context, dense_weights, grad, make_moe, make_router, preset, randn
from peers import FP32, FP64, close, gating, hf, hf_config, set_weights, st_moe
from torch import Tensor, nn

from moe_lab.model.moe import MoE
from moe_lab.routing import Context

B, S, D, F, E = 2, 24, 16, 24, 6
T = B * S


def copy_gated(ours: MoE, block: Any) -> None:
    """Our [E, D, gate then up] and [E, F, D] are their [E, gate then up, D] and [E, D, F]."""
    set_weights(
        {
            block.gate.weight: ours.router.weight_ED,
            block.experts.gate_up_proj: ours.experts.w_in_EID,
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
        "gradient of w_in": (grad(ours.experts.w_in_EID), grad(block.experts.gate_up_proj)),
        "gradient of w_out": (grad(ours.experts.w_out_EFD), grad(block.experts.down_proj).transpose(1, 2)),
    }


@pytest.mark.parametrize("k", [1, 2, 4])
def test_olmoe_block(k: int):
    """topk without renormalising: OLMoE's own setting; its gate is an fp32 softmax."""
    options = {"hidden_size": D, "intermediate_size": F, "num_experts": E, "num_experts_per_tok": k}
    block = hf("olmoe").OlmoeSparseMoeBlock(hf_config("OlmoeConfig", norm_topk_prob=False, **options)).double()
    ours = make_moe(preset("router", "topk", k=k, renormalise=False), D, E, width=F)
    copy_gated(ours, block)
    close(run_both(ours, block, context()), FP32)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_renormalised_blocks(name: str, k: int):
    """topk renormalised: Mixtral, and OLMoE with norm_topk_prob; both gates are fp32 softmaxes.

    k=1 is left out: the true gradient of the router is zero there, and both only show its rounding."""
    options: dict[str, Any] = {"hidden_size": D, "intermediate_size": F, "num_experts_per_tok": k}
    if name == "olmoe":
        config = hf_config("OlmoeConfig", num_experts=E, norm_topk_prob=True, **options)
        block = hf("olmoe").OlmoeSparseMoeBlock(config).double()
    else:
        config = hf_config("MixtralConfig", num_local_experts=E, **options)
        block = hf("mixtral").MixtralSparseMoeBlock(config).double()
    ours = make_moe(preset("router", "topk", k=k), D, E, width=F)
    copy_gated(ours, block)
    close(run_both(ours, block, context()), FP32)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_deepseek_v3_block(renormalise: bool, biased: bool):
    """sigmoid_topk with two shared experts, one group, no scaling factor; scores are fp32. e_score_correction_bias is
    our selection bias: large enough here to change many choices, and in no weight."""
    config = hf_config(
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
    block = hf("deepseek_v3").DeepseekV3MoE(config).double()
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
def test_switch_block_and_its_capacity(capacity: int):
    """Top-1 scaled by its probability, tokens beyond an expert's capacity dropped, first come in token order.

    Theirs counts capacity per sequence, ours over the batch: one sequence makes them the same. It never takes float64
    from a config, but follows its dtype attribute. Their activation is set to our GELU."""
    options = {"d_model": D, "d_ff": F, "num_experts": E, "dropout_rate": 0.0, "dense_act_fn": "gelu"}
    config = hf_config("SwitchTransformersConfig", expert_capacity=capacity, **options)
    block = hf("switch_transformers").SwitchTransformersSparseMLP(config).double().eval()
    block.router.dtype = torch.float64
    factor = capacity * E / T
    ours = make_moe(preset("router", "switch"), D, E, "mlp", width=F)
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    set_weights({block.router.classifier.weight: ours.router.weight_ED})
    for e, expert in enumerate(experts):
        set_weights({expert.wi.weight: ours.experts.w_in_EID[e], expert.wo.weight: ours.experts.w_out_EFD[e].T})

    x_TD, c_TD = randn(T, D).requires_grad_(), randn(T, D, key=("c",))
    x_1TD = x_TD.detach()[None].requires_grad_()
    y_TD, routing = ours(x_TD, context(capacity=factor))
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
            "gradient of w_in": (grad(ours.experts.w_in_EID), w_in),
            "gradient of w_out": (grad(ours.experts.w_out_EFD), w_out.transpose(1, 2)),
        },
        FP64,
    )
    plan, mask = routing.plan, block.router(x_1TD)[0][0]
    assert torch.equal(plan.kept_E, mask.sum(0))
    assert int(plan.kept_E.sum()) < T or capacity == 100


def test_gpt_oss_router():
    """Softmax over the chosen logits is our renormalised softmax over all."""
    config = hf_config("GptOssConfig", hidden_size=D, num_local_experts=E, num_experts_per_tok=3)
    theirs = hf("gpt_oss").GptOssTopKRouter(config).double()
    ours = make_router(preset("router", "topk", k=3), D, E)
    set_weights({theirs.weight: ours.weight_ED, theirs.bias: torch.zeros(E)})
    x_TD, c_TE = randn(T, D), randn(T, E, key=("c",))
    _, scores_TK, chosen_TK = theirs(x_TD)
    weight_TE = torch.zeros(T, E, dtype=torch.float64).scatter(1, chosen_TK, scores_TK)
    mine_TE = dense_weights(ours(x_TD, context()).plan)
    (weight_TE * c_TE).sum().backward()
    (mine_TE * c_TE).sum().backward()
    close({"weights": (mine_TE, weight_TE), "gradient": (grad(ours.weight_ED), grad(theirs.weight))}, FP64)


def test_st_moe_layer():
    """The whole layer with our experts in its slots. Its straight-through dispatch is another estimator: off."""
    ours = make_moe(preset("router", "topk"), D, E, "mlp", width=F)

    class Expert(nn.Module):
        def __init__(self, e: int):
            super().__init__()
            self.w_in = nn.Parameter(ours.experts.w_in_EID[e].T.detach().clone())
            self.w_out = nn.Parameter(ours.experts.w_out_EFD[e].detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return nnF.gelu(x @ self.w_in) @ self.w_out

    experts = nn.ModuleList([Expert(e) for e in range(E)])
    layer = st_moe().MoE(D, E, experts=experts, straight_through_dispatch_tensor=False)
    layer.gate = gating(D, E, 2)
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
                grad(ours.experts.w_in_EID),
                torch.stack([grad(m.w_in).T for m in layer.experts.experts]),
            ),
        },
        FP64,
    )
