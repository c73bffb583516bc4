"""Softmax over a few experts takes another way on a CPU than over many, to the same values and gradients."""

import pytest
import torch
from layers import randn

from moe_lab.scores import log_softmax, softmax


@pytest.mark.parametrize("shape", [(5, 1), (5, 8), (1, 3), (5, 15), (5, 16), (4, 2, 3), (3, 2, 17)])
def test_softmax_is_over_the_last_dimension(shape: tuple[int, ...]) -> None:
    """Also where an expert is forbidden, and of scores that no exponential could hold."""
    given = randn(*shape) * 500
    if shape[-1] > 1:
        given[0, ..., 0] = -torch.inf
    weight = randn(*shape, key=("weight",))
    for ours, function in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        x, y = given.clone().requires_grad_(), given.clone().requires_grad_()
        found, expected = ours(x), function(y, -1)
        assert found.shape == shape
        torch.testing.assert_close(found, expected)
        (found.exp() * weight).sum().backward()
        (expected.exp() * weight).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
