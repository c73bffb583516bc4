"""Router maths in fp32 of tokens in any dtype. Shapes: T tokens, D width, X what they are projected to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def precise(x_TD: Tensor) -> Tensor:
    return x_TD if x_TD.dtype == torch.float64 else x_TD.float()


def linear(x_TD: Tensor, w_XD: Tensor) -> Tensor:
    """x w^T [T, X] in the dtype of w."""
    if x_TD.dtype == w_XD.dtype or torch.compiler.is_compiling():
        return F.linear(x_TD.to(w_XD.dtype), w_XD)
    return _Linear.apply(x_TD, w_XD)  # pyright: ignore[reportReturnType]


class _Linear(Function):
    """The cast of the tokens is repeated in backward, not kept; the gradient to them then takes its place."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_XD: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, w_XD)
        return F.linear(x_TD.to(w_XD.dtype), w_XD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TX: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, w_XD = ctx.saved_tensors
        cast_TD = x_TD.to(w_XD.dtype)
        grad_XD = grad_TX.T @ cast_TD if ctx.needs_input_grad[1] else None
        grad_TD = torch.mm(grad_TX, w_XD, out=cast_TD).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
        return grad_TD, grad_XD
