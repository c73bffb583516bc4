"""Experts: stacked feed-forward networks, and experts without one, on rows sorted by expert.

Shapes: N rows sorted by expert, D width, F hidden, E experts, G of them with a network, I input-side neurons (F, or 2F
for gated experts).
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moe_lab.config import option, registered, schema, shown
from moe_lab.model.products import grouped, loop
from moe_lab.model.weightless import Weightless
from moe_lab.plans import Drop
from moe_lab.schedules import Positive
from moe_lab.seeding import parameter
from moe_lab.sizes import repeated, split, usual_width

PosInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
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
    """G networks, then experts without one. `forward(rows_ND, counts_E)` runs each on its own slice of the sorted rows.

    Rows behind the last expert's (dropped by capacity) come out undefined; the plan masks them.
    num: experts, of which `networks` have a network and the last ones have none. widths: neurons of each network. Those
    narrower than `width`, the widest, are padded with neurons of zeros, which compute nothing and get no gradient.
    whole: the width of an expert before `granularity` splits it.
    """

    sides = 1  # input-side matrices: 1, or 2 for gated experts (gate first)
    real_EF: Tensor | None  # False where a neuron is padding, None where none is

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        num: PosInt = 8,
        width: PosInt | None = None,
        widths: Annotated[list[PosInt], Field(min_length=1)] | None = None,
        granularity: PosInt = 1,
        shared_experts: Count = 0,
        zero_experts: Count = 0,
        copy_experts: Count = 0,
        constant_experts: Count = 0,
        init: Literal["independent", "upcycled"] = "independent",
        init_noise: Annotated[float, Field(ge=0)] = 0.0,
        capacity_factor: Positive | None = None,
        drop: Drop = "position",
        backend: Backend = "auto",
    ):
        super().__init__()
        g = granularity
        self.whole = width or usual_width(dim, self.sides)
        self.widths = [w // g for w in repeated(widths or [self.whole], num) for _ in range(g)]
        self.networks, self.width = len(self.widths), max(self.widths)
        free = [g * n for n in (zero_experts, copy_experts, constant_experts)]
        self.weightless = Weightless(dim, *free) if any(free) else None
        self.num, self.granularity = self.networks + sum(free), g
        self.shared_experts, self.capacity_factor, self.backend = shared_experts, capacity_factor, backend
        self.drop: Drop = drop
        std_in, std_out = self._spread(dim, depth)
        alike = init_noise if init == "upcycled" else None
        # Input side by neuron, so that the gradient dh^T x of a CPU's product comes out in the order of its memory.
        self.w_in_EID = parameter(self.networks, self.sides * self.width, dim, std=std_in, alike=alike)
        self.w_out_EFD = parameter(self.networks, self.width, dim, std=std_out, alike=alike)
        if self.real_EF is not None:  # a loss on the weights themselves would move what computes nothing
            self.w_in_EID.register_hook(lambda grad_EID: grad_EID * self._real_EI1)
            self.w_out_EFD.register_hook(lambda grad_EFD: grad_EFD * self._real_EF1)

    def _spread(self, dim: int, depth: int) -> tuple[float | Tensor, float | Tensor]:
        """Standard deviations that the weights start with, for each expert those of its own width; marks padding."""
        self.register_buffer("real_EF", None, persistent=False)
        # Residual branches shrink with depth, so that the stream's variance does not grow with it (GPT-2).
        std_in, std_out = dim**-0.5, (2 * depth * self.width) ** -0.5
        if min(self.widths) == self.width:
            return std_in, std_out
        width_E11 = torch.tensor(self.widths)[:, None, None]
        self.real_EF = torch.arange(self.width) < width_E11[:, 0]
        return std_in * self._real_EI1, (2 * depth * width_E11) ** -0.5 * self._real_EF1

    @staticmethod
    def neurons(h_NI: Tensor) -> Tensor:
        """Activation of the neurons that read the input directly, [N, F]: the gate side of gated experts."""
        raise NotImplementedError

    @classmethod
    def activate(cls, h_NI: Tensor) -> Tensor:
        """Input-side products [N, I] -> hidden [N, F]."""
        return cls.neurons(h_NI)

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        if self.weightless is None:
            return self._compute(rows_ND, counts_E)
        place_N = owner(counts_E, len(rows_ND)) - self.networks
        networks_N1, free_N1 = (place_N < 0)[:, None], ((place_N >= 0) & (place_N < self.weightless.num))[:, None]
        # What the networks leave undefined behind their last row, and its gradient, are masked.
        computed_ND = self._compute(rows_ND.where(networks_N1, 0), counts_E[: self.networks])
        return computed_ND.where(networks_N1, self.weightless(rows_ND.where(free_N1, 0), place_N))

    def _compute(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        multiply = self._product(rows_ND)
        h_NI = multiply(rows_ND, self.w_in_EID.transpose(1, 2), counts_E)
        return multiply(self.activate(h_NI), self.w_out_EFD, counts_E)

    def hidden(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Activations of the input-side neurons, [N, F]; undefined where an expert has no network, 0 in padding."""
        multiply = self._product(rows_ND)
        return self.neurons(multiply(rows_ND, self.w_in_EID.transpose(1, 2), counts_E[: self.networks]))

    def mean_activation(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Mean of `hidden` over the neurons of the row's expert, fp64 [N]; NaN where it has none."""
        none = [math.nan] * (self.num - self.networks + 1)  # the last: of rows behind the last expert's
        width_E = torch.tensor([*self.widths, *none], dtype=torch.float64, device=rows_ND.device)
        return self.hidden(rows_ND, counts_E).double().sum(-1) / width_E[owner(counts_E, len(rows_ND))]

    def read_in_EFD(self) -> Tensor:
        """Each network's input-side rows (the gate's for gated experts), [G, F, D]."""
        return self.w_in_EID[:, : self.width]

    def products(self) -> tuple[list[int], list[int]]:
        """Weights of each expert that meet one of its rows, without padding; and all that are multiplied with it."""
        each = (self.sides + 1) * self.w_in_EID.shape[2]
        free = [] if self.weightless is None else self.weightless.products()
        useful = [each * width for width in self.widths] + free
        return useful, [each * self.width + sum(free)] * self.networks + [sum(free)] * len(free)

    @property
    def _real_EF1(self) -> Tensor:
        assert self.real_EF is not None
        return self.real_EF[:, :, None]

    @property
    def _real_EI1(self) -> Tensor:
        return self._real_EF1.repeat(1, self.sides, 1)

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        g, dim, widths = node["granularity"], cfg["model"]["dim"], node["widths"]
        whole = node["width"] or usual_width(dim, cls.sides)
        said, each = (f"experts.widths={shown(widths)}", widths) if widths else (f"experts.width={whole}", [whole])
        found = []
        if node["num"] % len(each):
            found.append(f"{said}: experts.num={node['num']} must hold this pattern a whole number of times")
        if any(width % g for width in each):
            found.append(f"experts.granularity={g}: must divide {said}")
        elif node["backend"] == "grouped" and (max(each) // g % 8 or dim % 8):
            split = f" over experts.granularity={g}" if g > 1 else ""
            odd = [f"{said}{split}"] * bool(max(each) // g % 8) + [f"model.dim={dim}"] * bool(dim % 8)
            found.append(
                f"{', '.join(odd)}: experts.backend=grouped needs multiples of 8; experts.backend=auto takes any"
            )
        if node["init"] == "upcycled" and len(set(each)) > 1:
            found.append(f"experts.init=upcycled: {said} differ, but copies of one dense layer are equally wide")
        if node["init"] == "independent" and node["init_noise"]:
            found.append(f"experts.init_noise={node['init_noise']}: is added to copies; say experts.init=upcycled")
        return found + (_refused_split(cfg) if g > 1 else [])

    def _product(self, rows_ND: Tensor):
        """grouped_mm has no fp64 and needs rows of whole 16 bytes (torch 2.13)."""
        if self.backend == "auto":
            aligned = all(n * rows_ND.element_size() % 16 == 0 for n in (self.w_in_EID.shape[2], self.width))
            return grouped if aligned and rows_ND.dtype != torch.float64 else loop
        return {"grouped": grouped, "loop": loop}[self.backend]


def _refused_split(cfg: Mapping[str, Any]) -> list[str]:
    """What router and explorers have against the choice that runs, and not against the one that is asked for."""
    fine, g, router = split(cfg), cfg["experts"]["granularity"], cfg["router"]
    try:
        options = {key: value for key, value in fine["router"].items() if key != "name"}
        schema(registered("router")[router["name"]]).model_validate(options)
    except ValidationError:
        return [f"experts.granularity={g}: router={router['name']} takes no k={fine['router']['k']}"]
    found = []
    nodes = [("router", router, fine["router"]), *(("explore", node, node) for node in cfg["explore"].values())]
    for group, asked, runs in nodes:
        conflicts = getattr(registered(group)[asked["name"]], "conflicts", None)
        if conflicts and not conflicts(asked, cfg):
            found += [f"experts.granularity={g}: {line}" for line in conflicts(runs, fine)]
    return found


def owner(counts_E: Tensor, rows: int) -> Tensor:
    """The expert of each of so many sorted rows, [N]; E behind the last expert's."""
    return torch.searchsorted(counts_E.cumsum(0), torch.arange(rows, device=counts_E.device), right=True)


@option("experts", "mlp")
class MLP(Experts):
    """gelu(x W_in) W_out: two matrices, the exact GELU, no biases (GPT-2's, without them)."""

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
