"""Ways to run experts agree with each other and with a product written out, values and gradients.

Shapes: N rows sorted by expert, T tokens, D width, F hidden, E experts.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import context, dense_weights, fill, grad, make_moe, preset, randn, router_cases, told
from torch import Tensor
from torch.autograd import gradcheck

from moe_lab.config import build
from moe_lab.model.experts import Experts
from moe_lab.model.products import grouped, loop
from moe_lab.routing import Slots

D, WIDTH, E = 16, 32, 4
COUNTS = {
    "uneven": [5, 1, 9, 3],
    "empty experts": [0, 11, 0, 7],
    "empty last": [4, 6, 8, 0],
    "all to one": [0, 0, 18, 0],
    "one row": [0, 1, 0, 0],
    "no rows": [0, 0, 0, 0],
}
# Largest error over largest value: a few roundings of products of up to 64 terms.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def bank(kind: str, D: int = D, dtype: torch.dtype = torch.float32, **changes: Any) -> Experts:
    experts: Experts = build("experts", preset("experts", kind, num=E, **({"width": WIDTH} | changes)), D, 2)
    fill(experts)
    return experts.to(dtype)


def by_hand(experts: Experts, rows_ND: Tensor, counts: list[int]) -> Tensor:
    """Row by row, from the formula of each kind."""
    expert_N = [e for e, n in enumerate(counts) for _ in range(n)]
    out = []
    for row_D, e in zip(rows_ND, expert_N, strict=True):
        w_in_DI, w_out_FD = experts.w_in_EID[e].T, experts.w_out_EFD[e]
        if type(experts).__name__ == "MLP":
            h_F = F.gelu(row_D @ w_in_DI)
        else:
            h_F = F.silu(row_D @ w_in_DI[:, : experts.width]) * (row_D @ w_in_DI[:, experts.width :])
        out.append(h_F @ w_out_FD)
    return torch.stack(out)


def run(experts: Experts, rows_ND: Tensor, counts: list[int]) -> list[Tensor]:
    """Output and the gradients of rows and weights."""
    rows_ND = rows_ND.detach().requires_grad_()
    y_ND = experts(rows_ND, torch.tensor(counts))
    c_ND = randn(*y_ND.shape, key=("c",)).to(y_ND.dtype)
    inputs = (rows_ND, experts.w_in_EID, experts.w_out_EFD)
    return [y_ND, *torch.autograd.grad((y_ND * c_ND).sum(), inputs)]


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_loop_equals_the_formula(kind: str, counts: list[int]):
    experts = bank(kind, dtype=torch.float64, backend="loop")
    rows_ND = randn(sum(counts), D)
    y_ND = experts(rows_ND, torch.tensor(counts))
    assert y_ND.shape == rows_ND.shape
    if sum(counts):
        torch.testing.assert_close(y_ND, by_hand(experts, rows_ND, counts), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_equals_loop(kind: str, counts: list[int], dtype: torch.dtype):
    """Against the loop in float64 on the same numbers: one rounding error for each, not two compared."""
    rows_ND = randn(sum(counts), D).to(dtype)
    fast, exact = bank(kind, dtype=dtype, backend="grouped"), bank(kind, dtype=dtype, backend="loop").double()
    for got, expected in zip(run(fast, rows_ND, counts), run(exact, rows_ND.double(), counts), strict=True):
        assert got.dtype == dtype and got.shape == expected.shape
        if expected.numel():
            assert (got.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    empty_E = torch.tensor(counts) == 0
    for gradient in run(fast, rows_ND, counts)[2:]:
        assert not gradient[empty_E].any(), "an expert without rows has a gradient"


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_weights_cast_one_expert_at_a_time_are_weights_cast_at_once(kind: str, counts: list[int]):
    """fp32 weights under bf16 rows, as on a CPU: bit for bit what bf16 weights give, and gradients of fp32."""
    rows_ND = randn(sum(counts), D).to(torch.bfloat16)
    casting, cast = bank(kind, backend="grouped"), bank(kind, dtype=torch.bfloat16, backend="grouped")
    for got, expected in zip(run(casting, rows_ND, counts), run(cast, rows_ND, counts), strict=True):
        assert torch.equal(got, expected.to(got.dtype))
    assert all(g.dtype == torch.float32 for g in run(casting, rows_ND, counts)[2:])


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_gradients_against_finite_differences(kind: str):
    experts = bank(kind, 3, torch.float64, width=2, backend="loop")
    rows_ND = randn(7, 3).requires_grad_()

    def layer(rows_ND: Tensor, w_in_EID: Tensor, w_out_EFD: Tensor) -> Tensor:
        weights = {"w_in_EID": w_in_EID, "w_out_EFD": w_out_EFD}
        return torch.func.functional_call(experts, weights, (rows_ND, torch.tensor([2, 0, 4, 1])))

    assert gradcheck(layer, (rows_ND, experts.w_in_EID, experts.w_out_EFD))


@pytest.mark.parametrize(
    ("D", "width", "dtype", "expected"),
    [
        (16, 32, torch.float32, grouped),
        (16, 32, torch.bfloat16, grouped),
        (12, 20, torch.float32, grouped),  # 48 and 80 bytes
        (12, 20, torch.bfloat16, loop),  # 24 and 40 bytes: no whole 16s
        (15, 32, torch.float32, loop),
        (16, 33, torch.float32, loop),
        (16, 32, torch.float64, loop),
    ],
)
@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_auto_takes_grouped_where_it_runs(kind: str, D: int, width: int, dtype: torch.dtype, expected: Any):
    experts = bank(kind, D, dtype, width=width)
    rows_ND, counts_E = randn(9, D).to(dtype).requires_grad_(), torch.tensor([2, 0, 4, 3])
    assert experts._product(rows_ND) is expected
    experts(rows_ND, counts_E).square().sum().backward()
    assert torch.isfinite(grad(rows_ND)).all()


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_hidden_and_read_in_are_the_neurons_that_read_the_input(kind: str, backend: str):
    """act(read_in[e] @ x) is what hidden says: the gate side of SwiGLU, the only one of the MLP."""
    experts = bank(kind, backend=backend)
    counts = [5, 1, 9, 3]
    rows_ND = randn(sum(counts), D).float()
    read_in_EFD = experts.read_in_EFD()
    assert read_in_EFD.shape == (E, WIDTH, D)
    act = F.gelu if kind == "mlp" else F.silu
    expert_N = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    expected = act(torch.einsum("nfd,nd->nf", read_in_EFD[expert_N], rows_ND))
    torch.testing.assert_close(experts.hidden(rows_ND, torch.tensor(counts)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_rows_behind_the_last_expert_touch_nothing(backend: str, dtype: torch.dtype):
    """Capacity leaves dropped rows there; whatever they hold, no weight and no computed row may notice."""
    counts = [3, 0, 5, 2]
    experts = bank("swiglu", backend=backend)
    found = []
    for tail in (0.0, torch.nan):
        rows_ND = torch.cat([randn(10, D).float(), torch.full((4, D), tail)]).to(dtype).requires_grad_()
        y_ND = experts(rows_ND, torch.tensor(counts))[:10]
        found.append([y_ND, *torch.autograd.grad(y_ND.sum(), (experts.w_in_EID, experts.w_out_EFD))])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_shared_experts_add_one_network_as_wide_as_all_of_them(kind: str):
    """Two shared experts of width F are one network of width 2F: check it against the two halves, added."""
    moe = make_moe(preset("router", "topk"), D, E, kind, width=WIDTH, shared_experts=2)
    plain = make_moe(preset("router", "topk"), D, E, kind, width=WIDTH)
    x_TD = randn(9, D)
    assert moe.shared is not None and plain.shared is None
    sides = moe.shared.w_in_DI.view(D, -1, 2, WIDTH)  # [D, side, shared expert, F]
    added = torch.zeros_like(x_TD)
    for i in range(2):
        h_side = [x_TD @ sides[:, s, i] for s in range(sides.shape[1])]
        h_TF = F.gelu(h_side[0]) if kind == "mlp" else F.silu(h_side[0]) * h_side[1]
        added = added + h_TF @ moe.shared.w_out_FD.view(2, WIDTH, D)[i]
    torch.testing.assert_close(moe(x_TD, context())[0], plain(x_TD, context())[0] + added)


@pytest.mark.parametrize("node", router_cases())
def test_moe_layer_with_every_router(node: dict[str, Any]):
    """y = sum_e weight_te expert_e(x_t), and the grouped layer in fp32 follows the looped one in fp64."""
    found = []
    for dtype, backend in ((torch.float64, "loop"), (torch.float32, "grouped")):
        moe = make_moe(node, D, E, dtype=dtype, width=WIDTH, backend=backend)
        x_TD = randn(12, D).to(dtype).requires_grad_()
        y_TD, routing = moe(x_TD, context(**told(moe.router, 12)))
        (y_TD * randn(12, D, key=("c",)).to(dtype)).sum().backward()
        found.append([y_TD, grad(x_TD), grad(moe.experts.w_in_EID), grad(moe.experts.w_out_EFD)])
        if dtype == torch.float64 and not isinstance(routing.plan, Slots):  # tests/test_soft_moe.py has its formula
            every_TED = torch.stack([by_hand_all(moe.experts, x_TD, e) for e in range(E)], 1)
            torch.testing.assert_close(y_TD, torch.einsum("te,ted->td", dense_weights(routing.plan), every_TED))
    for exact, fast in zip(*found, strict=True):
        assert (fast.double() - exact).abs().max() <= 5e-6 * exact.abs().max()


def by_hand_all(experts: Experts, x_TD: Tensor, e: int) -> Tensor:
    counts = [0] * E
    counts[e] = len(x_TD)
    return by_hand(experts, x_TD, counts)
