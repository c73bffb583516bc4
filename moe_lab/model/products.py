"""Ways to multiply rows sorted by expert with a matrix per expert. Behind the last expert's rows: undefined.

Shapes: N rows, E experts, matrices X to Y.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Grouped(Function):
    """rows [N, X] times each expert's matrix [E, X, Y]. The cast of the weights is repeated in backward, not kept."""

    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, w_EXY: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NX, w_EXY, ends_E)
        return F.grouped_mm(rows_NX, w_EXY.to(rows_NX.dtype), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NY: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_NX, w_EXY, ends_E = ctx.saved_tensors
        grad_NY = grad_NY.contiguous()  # an expanded gradient has no strides that grouped_mm takes
        grad_NX = F.grouped_mm(grad_NY, w_EXY.to(grad_NY.dtype).transpose(1, 2), offs=ends_E)
        if w_EXY.stride(1) == 1:  # stored by neuron: so is its gradient
            grad_EXY = F.grouped_mm(grad_NY.t(), rows_NX, offs=ends_E).transpose(1, 2)
        else:
            grad_EXY = F.grouped_mm(rows_NX.t(), grad_NY, offs=ends_E)
        return grad_NX, grad_EXY.to(w_EXY.dtype), None


class _CastGrouped(Function):
    """The same where weights are cast on a CPU: one expert's at a time, so that the cast and the gradient before its
    own cast stay in the cache, instead of streaming those of all experts through memory."""

    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, w_EXY: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows_NX, w_EXY)
        ctx.counts = [*counts, rows_NX.shape[0] - sum(counts)]  # the last: rows behind the last expert's
        out_NY = rows_NX.new_empty(rows_NX.shape[0], w_EXY.shape[2])
        cast_XY = torch.empty_like(w_EXY[0], dtype=rows_NX.dtype)
        for rows, out, w_XY in zip(*_by_expert(ctx.counts, rows_NX, out_NY), w_EXY, strict=False):
            torch.mm(rows, cast_XY.copy_(w_XY), out=out)
        return out_NY

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NY: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_NX, w_EXY = ctx.saved_tensors
        grad_NX, grad_EXY = torch.empty_like(rows_NX), torch.empty_like(w_EXY)
        cast_XY = torch.empty_like(w_EXY[0], dtype=rows_NX.dtype)
        parts = _by_expert(ctx.counts, rows_NX, grad_NY.contiguous(), grad_NX)
        for rows, grad, grad_rows, w_XY, grad_w in zip(*parts, w_EXY, grad_EXY, strict=False):
            torch.mm(grad, cast_XY.copy_(w_XY).t(), out=grad_rows)
            if cast_XY.stride(0) == 1:  # stored by neuron
                torch.mm(grad.t(), rows, out=cast_XY.t())
            else:
                torch.mm(rows.t(), grad, out=cast_XY)
            grad_w.copy_(cast_XY)
        return grad_NX, grad_EXY, None


def _by_expert(counts: list[int], *sorted_N: Tensor) -> list[tuple[Tensor, ...]]:
    return [t.split(counts) for t in sorted_N]


def grouped(rows_NX: Tensor, w_EXY: Tensor, counts_E: Tensor) -> Tensor:
    """One grouped product for all experts, without a host sync (CUDA: bf16 on SM90+)."""
    casts = rows_NX.dtype != w_EXY.dtype
    if casts and rows_NX.device.type == "cpu" and not torch.compiler.is_compiling():
        return _CastGrouped.apply(rows_NX, w_EXY, counts_E.tolist())  # pyright: ignore
    ends_E = counts_E.cumsum(0).int()  # cast last: inductor forgets the dtype of a constant's cumsum (torch 2.13)
    return _Grouped.apply(rows_NX, w_EXY, ends_E)  # pyright: ignore


def loop(rows_NX: Tensor, w_EXY: Tensor, counts_E: Tensor) -> Tensor:
    """The oracle: a product per expert; any dtype and size. Unbind once: `w[e]` would cost a full gradient each."""
    counts = counts_E.tolist()
    rest = rows_NX.shape[0] - sum(counts)
    parts = rows_NX.split([*counts, rest])
    outs = [part @ w.to(rows_NX.dtype) for part, w in zip(parts, w_EXY.unbind(0), strict=False)]
    return torch.cat([*outs, rows_NX.new_zeros(rest, w_EXY.shape[2])])
