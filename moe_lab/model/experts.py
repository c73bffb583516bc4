"""Experts: stacked feed-forward networks and the ways to run them on rows sorted by expert.

Shapes: N rows sorted by expert, D width, F hidden, E experts, I input-side neurons (F, or 2F for gated experts).
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moe_lab.config import option
from moe_lab.plans import Drop
from moe_lab.schedules import Positive
from moe_lab.seeding import parameter

PosInt = Annotated[int, Field(ge=1)]
Backend = Literal["auto", "grouped", "loop"]


class FeedForward(nn.Module):
    """One dense feed-forward network, x [T, D] -> [T, D]; shared experts and the dense baseline."""

    def __init__(self, dim: int, width: int, kind: type["Experts"], depth: int):
        super().__init__()
        self.kind = kind
        self.w_in_DI = parameter(dim, kind.sides * width, std=dim**-0.5)
        self.w_out_FD = parameter(width, dim, std=(2 * depth * width) ** -0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        h_TI = x_TD @ self.w_in_DI.to(x_TD.dtype)
        return self.kind.activate(h_TI) @ self.w_out_FD.to(x_TD.dtype)


class Experts(nn.Module):
    """E networks of one shape. `forward(rows_ND, counts_E)` runs expert e on its own slice of the sorted rows.

    Rows behind the last expert's (dropped by capacity) come out undefined; the plan masks them.
    """

    sides = 1  # input-side matrices: 1, or 2 for gated experts (gate first)

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        num: PosInt = 8,
        width: PosInt | None = None,
        shared_experts: Annotated[int, Field(ge=0)] = 0,
        capacity_factor: Positive | None = None,
        drop: Drop = "position",
        backend: Backend = "auto",
    ):
        super().__init__()
        width = width or usual_width(dim, self.sides)
        self.num, self.width, self.backend = num, width, backend
        self.shared_experts, self.capacity_factor = shared_experts, capacity_factor
        self.drop: Drop = drop
        # Input side by neuron, so that the gradient dh^T x of a CPU's product comes out in the order of its memory.
        self.w_in_EID = parameter(num, self.sides * width, dim, std=dim**-0.5)
        # Residual branches shrink with depth, so that the stream's variance does not grow with it (GPT-2).
        self.w_out_EFD = parameter(num, width, dim, std=(2 * depth * width) ** -0.5)

    @staticmethod
    def neurons(h_NI: Tensor) -> Tensor:
        """Activation of the neurons that read the input directly, [N, F]: the gate side of gated experts."""
        raise NotImplementedError

    @classmethod
    def activate(cls, h_NI: Tensor) -> Tensor:
        """Input-side products [N, I] -> hidden [N, F]."""
        return cls.neurons(h_NI)

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        multiply = self._product(rows_ND)
        h_NI = multiply(rows_ND, self.w_in_EID.transpose(1, 2), counts_E)
        return multiply(self.activate(h_NI), self.w_out_EFD, counts_E)

    def hidden(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Activations of the input-side neurons, [N, F]."""
        return self.neurons(self._product(rows_ND)(rows_ND, self.w_in_EID.transpose(1, 2), counts_E))

    def read_in_EFD(self) -> Tensor:
        """Each expert's input-side rows (the gate's for gated experts), [E, F, D]."""
        return self.w_in_EID[:, : self.width]

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        sizes = {"experts.width": node["width"] or 8, "model.dim": cfg["model"]["dim"]}
        odd = [f"{name}={size}" for name, size in sizes.items() if size % 8]
        if node["backend"] == "grouped" and odd:
            return [f"{', '.join(odd)}: experts.backend=grouped needs multiples of 8; experts.backend=auto takes any"]
        return []

    def _product(self, rows_ND: Tensor):
        """grouped_mm has no fp64 and needs rows of whole 16 bytes (torch 2.13)."""
        if self.backend == "auto":
            aligned = all(n * rows_ND.element_size() % 16 == 0 for n in (self.w_in_EID.shape[2], self.width))
            return grouped if aligned and rows_ND.dtype != torch.float64 else loop
        return {"grouped": grouped, "loop": loop}[self.backend]


def usual_width(dim: int, sides: int) -> int:
    """4 dim, or 8/3 dim for gated experts, which hold as many parameters with three matrices; whole 16s."""
    return 16 * math.ceil(8 * dim / (1 + sides) / 16)


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


@option("experts", "mlp")
class MLP(Experts):
    """Two matrices and a GELU."""

    @staticmethod
    def neurons(h_NI: Tensor) -> Tensor:
        return F.gelu(h_NI)


@option("experts", "swiglu")
class SwiGLU(Experts):
    """SiLU(x W_gate) * (x W_up), then W_out (Shazeer 2020, arXiv 2002.05202)."""

    sides = 2

    @staticmethod
    def neurons(h_NI: Tensor) -> Tensor:
        return F.silu(h_NI.chunk(2, -1)[0])

    @classmethod
    def activate(cls, h_NI: Tensor) -> Tensor:
        return _SwiGLU.apply(h_NI)  # pyright: ignore[reportReturnType]


class _SwiGLU(Function):
    """silu(gate) * up of h = [gate, up]; backward writes both halves of its gradient in place (no concatenation)."""

    @staticmethod
    def forward(ctx: Any, h_NI: Tensor) -> Tensor:
        gate_NF, up_NF = h_NI.chunk(2, -1)
        silu_NF = F.silu(gate_NF)
        ctx.save_for_backward(h_NI, silu_NF)
        return silu_NF * up_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        h_NI, silu_NF = ctx.saved_tensors
        gate_NF, up_NF = h_NI.chunk(2, -1)
        if torch.compiler.is_compiling():  # which cannot trace `out=` into a half, and writes both in one pass itself
            return torch.cat([torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF), grad_NF * silu_NF], -1)
        grad_NI = torch.empty_like(h_NI)
        grad_gate_NF, grad_up_NF = grad_NI.chunk(2, -1)
        torch.mul(grad_NF, silu_NF, out=grad_up_NF)
        torch.ops.aten.silu_backward.grad_input(grad_NF * up_NF, gate_NF, grad_input=grad_gate_NF)
        return grad_NI
