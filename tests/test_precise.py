"""The router's product with bf16 tokens is that of their fp32 copy, to the bit, and so are its gradients."""

import pytest
import torch
from layers import randn

from moe_lab.precise import linear


@pytest.mark.parametrize("learned", [("x", "w"), ("x",), ("w",)])
def test_product_with_bf16_tokens(learned: tuple[str, ...]) -> None:
    x_TD, w_XD, grad_TX = randn(40, 16).bfloat16(), randn(8, 16, key=("w",)).float(), randn(40, 8, key=("g",)).float()
    found = []
    for product in (linear, lambda x, w: torch.nn.functional.linear(x.float(), w)):
        x, w = x_TD.clone().requires_grad_("x" in learned), w_XD.clone().requires_grad_("w" in learned)
        y_TX = product(x, w)
        y_TX.backward(grad_TX)
        found.append((y_TX.detach(), x.grad, w.grad))
    for ours, expected in zip(*found, strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or (ours.dtype == expected.dtype and torch.equal(ours, expected))


def test_no_copy_of_the_tokens_is_kept() -> None:
    """What backward holds of them is the tokens themselves."""
    x_TD, w_XD = randn(40, 16).bfloat16().requires_grad_(), randn(8, 16, key=("w",)).float().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x_TD, w_XD)
    assert {t.data_ptr() for t in kept} == {x_TD.data_ptr(), w_XD.data_ptr()}
