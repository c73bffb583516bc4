"""On one token the nonzero gradient rows of router and expert are collinear with the input (arXiv 2605.12476).

Shapes: D width, E experts, I input-side neurons.
"""

from typing import Any

import pytest
import torch.nn.functional as F
from layers import context, dense_weights, grad, make_moe, preset, randn, router_cases, told, traits, underway

D, E = 16, 6


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
@pytest.mark.parametrize("node", router_cases())
def test_gradient_rows_point_along_the_token(node: dict[str, Any], kind: str):
    moe = underway(make_moe(node, D, E, kind, width=8))
    x_1D = randn(1, D)
    y_1D, routing = moe(x_1D, context(**told(moe.router, 1)))
    (y_1D * randn(1, D, key=("c",))).sum().backward()
    own = {name: p.grad for name, p in moe.router.named_parameters() if name.endswith("_ED")}  # that multiply the token
    rows = {f"router.{name}": gradient for name, gradient in own.items() if gradient is not None}
    rows |= {f"experts.w_in[{e}]": grad(moe.experts.w_in_EID)[e] for e in range(E)}  # one row per neuron
    largest = max(float(g.norm(dim=-1).max()) for g in rows.values())
    for name, g_RD in rows.items():
        # What is left of a frozen router's gradient is the rounding of 1 - 1: it has no direction.
        alive = g_RD[g_RD.norm(dim=-1) > 1e-12 * largest]
        cosine = F.cosine_similarity(alive, x_1D).abs()
        assert (cosine - 1).abs().le(1e-10).all(), name
        if name.startswith("router"):
            assert len(alive) > 0 if traits(node, E).live else len(alive) == 0, name
    weight_E = dense_weights(routing.plan)[0]  # dense backward trains the chosen alone
    for e in range(E):
        assert bool(rows[f"experts.w_in[{e}]"].any()) == bool(weight_E[e])


def test_two_tokens_are_not_collinear():
    """The identity is of one token: the same cosine over two tokens must be able to fail."""
    moe = make_moe(preset("router", "topk"), D, E)
    x_2D = randn(2, D)
    y_2D, _ = moe(x_2D, context())
    (y_2D * randn(2, D, key=("c",))).sum().backward()
    cosine = F.cosine_similarity(grad(moe.router.weight_ED), x_2D[:1]).abs()
    assert (cosine < 0.99).any()
