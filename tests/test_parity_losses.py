"""Losses, gates and Gumbel samples against independent implementations, values and gradients.

transformers 5, st-moe-pytorch 0.1.8 and torch's gumbel_softmax, in float64 unless the peer sums in fp32.

Shapes: T tokens, E experts, K chosen per token.
"""

import pytest
import torch
import torch.nn.functional as nnF
from layers import context, dense_weights, grad, make_router, preset, randn
from peers import FP32, FP64, close, gating, hf, set_weights
from torch import Tensor

from moe_lab.balance.base import Balancer, mean_over_layers
from moe_lab.config import build
from moe_lab.routing import Assignments, Routing

T, D, E = 48, 16, 6


def routing_of(logits_TE: Tensor, k: int) -> Routing:
    """A top-k softmax routing of given logits, without a router."""
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
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "nllb_moe"])
def test_load_balancing_loss_of_one_layer(name: str, k: int):
    """Theirs counts k assignments per token and does not divide by k: k at balance. Its sums are fp32."""
    logits_TE = skewed()
    theirs = hf(name).load_balancing_loss_func((logits_TE,), E, k)
    ours = balancer("switch").loss(routing_of(logits_TE, k))
    assert float(ours.detach()) > 1.1
    close_losses(k * ours, theirs, logits_TE, FP32)


def test_load_balancing_loss_of_two_layers_differs_and_should():
    """Complementary halves dead: theirs pools the layers and reads k, its value at balance; ours reads 2."""
    dead = torch.full((E,), -30.0, dtype=torch.float64)
    dead[: E // 2] = 0
    layers = tuple(randn(T, E, key=(str(i),)) * 1e-3 + mask for i, mask in enumerate((dead, dead.flip(0))))
    theirs = hf("mixtral").load_balancing_loss_func(layers, E, 2)
    assert float(theirs) == pytest.approx(2, abs=0.01)
    ours = mean_over_layers(balancer("switch"), [routing_of(logits_TE, 2) for logits_TE in layers])
    assert float(ours) == pytest.approx(2, abs=0.01)
    assert float(ours) / float(theirs / 2) == pytest.approx(2, abs=0.02), "theirs, per k, says all is well"


def test_switch_losses():
    model = hf("switch_transformers")
    logits_TE = skewed()
    routing = routing_of(logits_TE, 1)
    theirs = model.load_balancing_loss_func(routing.probs_TE[None], routing.plan.selected_TK.T)
    close_losses(balancer("switch").loss(routing), theirs, logits_TE, FP32)  # its counts are fp32
    close_losses(balancer("z_loss").loss(routing), model.router_z_loss_func(logits_TE[None]), logits_TE, FP64)


@pytest.mark.parametrize("k", [2, 3])
def test_st_moe_gate_and_losses(k: int):
    """Its combine tensor, summed over slots, is topk renormalised. Its balance loss is that of the first choices only,
    so it is compared with our switch loss of a top-1 choice, not with that of k. Its z-loss is ours.

    Not comparable: top-1 (it asks for 2 or more), its random second expert (off here), and capacity, where it serves
    all first choices before any second and we go by token."""
    gate = gating(D, E, k)
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
    tolerance = {"weights": FP64, "balance": FP32, "z": FP64}  # it counts in fp32
    for name, (mine, theirs) in pairs.items():
        close({name: (mine, theirs)}, tolerance[name])
        c = c_TE if mine.ndim else torch.tensor(1.0)
        (a,) = torch.autograd.grad((mine * c).sum(), ours.weight_ED, retain_graph=True)
        (b,) = torch.autograd.grad((theirs * c).sum(), gate.to_gates.weight, retain_graph=True)
        close({f"gradient of {name}": (a, b)}, tolerance[name])


# torch's gumbel_softmax draws -log(Exp(1)) from the global stream; the same draws are handed to our routers.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("form", ["soft", "dense", "selected"])
def test_gumbel_softmax(form: str, temperature: float):
    """Soft: gumbel_softmax. Hard, backward=dense: gumbel_ste in value and gradient. backward=selected hands on the
    gradient of the chosen column alone."""
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
