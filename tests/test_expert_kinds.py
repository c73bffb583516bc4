"""Fine-grained, narrower, weightless and upcycled experts against loops over tokens and experts in float64.

Shapes: T tokens, D width, E experts, F hidden, K chosen.
"""

from typing import Any

import pytest
import torch
from layers import context, dense_weights, draw, make_router, preset, randn, router_cases, told
from oracles import experts as oracle
from tiny import tiny
from torch import Tensor

from moe_lab import seeding
from moe_lab.assemble import assemble
from moe_lab.config import build, check, registered
from moe_lab.cost import cost
from moe_lab.model.experts import Experts, FeedForward
from moe_lab.model.moe import MoE
from moe_lab.optim import AdamW
from moe_lab.routing import Context, Slots
from moe_lab.sizes import routed

D, T = 16, 11
KINDS = {
    "fine": {"num": 3, "width": 32, "granularity": 4},
    "two widths": {"num": 4, "widths": [8, 24]},
    "four widths": {"num": 4, "widths": [24, 8, 16, 32]},
    "fine and narrow": {"num": 2, "widths": [16, 32], "granularity": 2},
    "zero": {"num": 3, "width": 16, "zero_experts": 2},
    "copy": {"num": 3, "width": 16, "copy_experts": 1},
    "constant": {"num": 2, "width": 16, "constant_experts": 2},
    "all of MoE++": {"num": 2, "widths": [8, 16], "zero_experts": 1, "copy_experts": 2, "constant_experts": 2},
    "fine MoE++": {"num": 1, "width": 16, "granularity": 2, "zero_experts": 1, "constant_experts": 1},
    "one of each": {"num": 2, "widths": [8, 16], "zero_experts": 1, "copy_experts": 1, "constant_experts": 1},
    "one expert": {"num": 1, "width": 16},
    "upcycled": {"num": 3, "width": 16, "init": "upcycled", "init_noise": 0.1},
}
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2}
cases = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
kinds = pytest.mark.parametrize("kind", ["mlp", "swiglu"])


def bank(kind: str, **changes: Any) -> Experts:
    """As a run starts it, but for the mixing weights of constant experts, which start too small to see."""
    experts: Experts = build("experts", preset("experts", kind, **changes), D, 2)
    seeding.initialise(experts, 3)
    if experts.weightless is not None and experts.weightless.constant:
        with torch.no_grad():
            experts.weightless.mix_C2D.mul_(20)
    return experts.double()


def layer(experts: Experts, router: str = "topk", **changes: Any) -> MoE:
    node = preset("router", router, **changes)
    return MoE(make_router(node, D, experts.num), experts, 2).double()


def one_by_one(kind: str, experts: Experts, leaves: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """Each expert's own weights, cut out of the stacked ones."""
    found: list[tuple[Any, ...]] = []
    for e, width in enumerate(experts.widths):
        sides = leaves["w_in_EID"][e].split(experts.width)
        found.append((kind, *(side_FD[:width] for side_FD in sides), leaves["w_out_EFD"][e, :width]))
    if (free := experts.weightless) is not None:
        found += [("zero",)] * free.zero + [("copy",)] * (free.moving - free.zero)
        found += [
            ("constant", leaves["weightless.mix_C2D"][c], leaves["weightless.v_CD"][c]) for c in range(free.constant)
        ]
    assert len(found) == experts.num
    return found


def by_loops(kind: str, moe: MoE, x_TD: Tensor, c_TD: Tensor, ctx: Context) -> list[Tensor]:
    """Output and gradients of the input and of all weights of the experts, from the oracle."""
    x_TD = x_TD.detach().double().requires_grad_()
    leaves = {name: p.detach().double().requires_grad_() for name, p in moe.experts.named_parameters()}
    plan = moe(x_TD, ctx)[1].plan
    y_TD = oracle.layer(x_TD, dense_weights(plan), one_by_one(kind, moe.experts, leaves))
    return [y_TD, *torch.autograd.grad((y_TD * c_TD).sum(), [x_TD, *leaves.values()], materialize_grads=True)]


def ours(moe: MoE, x_TD: Tensor, c_TD: Tensor, ctx: Context) -> list[Tensor]:
    x_TD = x_TD.detach().requires_grad_()
    y_TD, _ = moe(x_TD, ctx)
    return [y_TD, *torch.autograd.grad((y_TD * c_TD.to(y_TD.dtype)).sum(), [x_TD, *moe.experts.parameters()])]


ROUTERS = {"topk": {"k": 2, "renormalise": False}, "dense": {}, "switch": {"k": 1}}


@kinds
@cases
@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_is_its_experts_one_by_one(kind: str, changes: dict[str, Any], router: str):
    """Values and gradients, also where capacity drops rows, with experts that nobody chose and fewer tokens than E."""
    experts = bank(kind, backend="loop", **changes)
    moe = layer(experts, router, **(ROUTERS[router] if experts.num > 1 else {"k": 1}))
    for tokens, capacity in ((T, None), (2, None), (T, 0.7)):
        x_TD, c_TD, ctx = randn(tokens, D), randn(tokens, D, key=("c",)), context(capacity=capacity)
        for mine, exact in zip(ours(moe, x_TD, c_TD, ctx), by_loops(kind, moe, x_TD, c_TD, ctx), strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-13)
    if router != "dense":
        plan = moe(randn(T, D), context(capacity=0.7))[1].plan
        assert plan.counts_E.sum() < T * moe.router.k


@kinds
@cases
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_every_backend_and_dtype_gives_the_same(kind: str, changes: dict[str, Any], dtype: torch.dtype, backend: str):
    """Rows through all experts, some without rows and some rows behind the last expert's; weights stay fp32."""
    exact = bank(kind, backend="loop", **changes)
    fast = bank(kind, backend=backend, **changes).float()
    counts = [(5, 0, 3, 1)[e % 4] for e in range(exact.num)]
    rows_ND = randn(sum(counts), D).to(dtype)
    found = [run(experts, rows, counts) for experts, rows in ((exact, rows_ND.double()), (fast, rows_ND))]
    for expected, mine in zip(*found, strict=True):
        assert mine.isfinite().all()
        assert found[1][0].dtype == dtype
        assert (mine.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def run(experts: Experts, rows_ND: Tensor, counts: list[int]) -> list[Tensor]:
    """Output and gradients of the rows that belong to experts; two more stand behind them and hold NaN."""
    rows_ND = rows_ND.detach().requires_grad_()
    behind_ND = torch.full((2, D), torch.nan, dtype=rows_ND.dtype)
    y_ND = experts(torch.cat([rows_ND, behind_ND]), torch.tensor(counts))[: len(rows_ND)]
    c_ND = randn(*y_ND.shape, key=("c",)).to(y_ND.dtype)
    return [y_ND, *torch.autograd.grad((y_ND * c_ND).sum(), [rows_ND, *experts.parameters()])]


@kinds
def test_padding_stays_zero_whatever_the_loss(kind: str):
    """Also under weight decay, and under a loss on the weights that pulls each towards its neighbours'."""
    experts = bank(kind, num=4, widths=[8, 24, 16, 24]).float()
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build(experts)
    before = [p.detach().clone() for p in experts.parameters()]
    for step in range(5):
        rows_ND = randn(40, D, key=(step,)).float()
        apart = sum((p - p.roll(1, 0)).square().sum() for p in experts.parameters())
        (experts(rows_ND, torch.tensor([10, 10, 10, 10])).square().sum() + apart).backward()
        optimizer.step(0.1, torch.zeros(()))
        optimizer.zero_grad()
    assert experts.real_EF is not None
    assert experts.real_EF.sum(1).tolist() == [8, 24, 16, 24]
    real_EIF = {"w_in_EID": experts.real_EF.repeat(1, experts.sides), "w_out_EFD": experts.real_EF}
    for (name, p), old in zip(experts.named_parameters(), before, strict=True):
        real = real_EIF[name]
        assert not p[~real].any()
        assert (p != old)[real].all()


def test_narrow_experts_start_as_their_width_asks():
    """Each expert's output starts with the variance that an expert of its width alone has."""
    experts = build("experts", preset("experts", "mlp", num=2, widths=[64, 256]), 32, 3)
    seeding.initialise(experts, 0)
    for e, width in enumerate((64, 256)):
        assert experts.w_out_EFD[e, :width].std().item() == pytest.approx((2 * 3 * width) ** -0.5, rel=0.05)
        assert experts.w_in_EID[e, :width].std().item() == pytest.approx(32**-0.5, rel=0.05)


@pytest.mark.parametrize("node", router_cases())
def test_every_router_takes_experts_of_every_kind(node: dict[str, Any]):
    """Whatever its plan hands over, each row meets its own expert: values and gradients, row by row."""
    moe = MoE(make_router(node, D, 5), bank("swiglu", **KINDS["one of each"]), 2).double()
    x_TD, c_TD = randn(6, D).requires_grad_(), randn(6, D, key=("c",))
    y_TD, routing = moe(x_TD, context(**told(moe.router, 6)))
    plan, experts = routing.plan, one_by_one("swiglu", moe.experts, dict(moe.experts.named_parameters()))
    expert_N = [e for e, n in enumerate(plan.counts_E.tolist()) for _ in range(n)]
    rows_ND = plan.gather(x_TD)
    out_ND = torch.zeros_like(rows_ND).index_add(
        0,
        torch.arange(len(expert_N)),
        torch.stack([oracle.expert(rows_ND[n], *experts[e]) for n, e in enumerate(expert_N)]),
    )
    expected_TD = plan.combine(out_ND)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-11, atol=1e-13)
    leaves = [x_TD, *moe.experts.parameters()]
    mine, exact = (
        torch.autograd.grad((t * c_TD).sum(), leaves, retain_graph=True, materialize_grads=True)
        for t in (y_TD, expected_TD)
    )
    torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("node", router_cases())
def test_upcycled_without_noise_is_the_dense_layer(node: dict[str, Any]):
    """For every router, scaled by the sum of its weights: the dense layer itself where they sum to one."""
    for kind in ("mlp", "swiglu"):
        experts = bank(kind, num=4, width=24, init="upcycled", backend="loop")
        dense = FeedForward(D, 24, type(experts), 2).double()
        with torch.no_grad():
            dense.w_in_DI.copy_(experts.w_in_EID[0].T)
            dense.w_out_FD.copy_(experts.w_out_EFD[0])
        moe, x_TD = MoE(make_router(node, D, 4), experts, 2).double(), randn(T, D)
        y_TD, routing = moe(x_TD, context(**told(moe.router, T)))
        if isinstance(routing.plan, Slots):  # whose experts read mixtures of tokens
            expected_TD = routing.plan.combine(dense(routing.plan.gather(x_TD)))
        else:
            expected_TD = dense(x_TD) * dense_weights(routing.plan).sum(1, keepdim=True)
        torch.testing.assert_close(y_TD, expected_TD)


SUM_TO_ONE = ["router=topk", "router=noisy_topk", "router=dense", "router=gumbel_ste"]


@pytest.mark.parametrize("router", SUM_TO_ONE)
def test_an_upcycled_model_is_a_dense_model(router: str):
    """The same logits whatever the router chooses, layer after layer; with noise they differ."""
    logits = []
    for words in ([router, "router.k=1"], [router, "router.k=2"], [router, "router.k=2", "experts.init_noise=0.1"]):
        parts = assemble(tiny("experts.init=upcycled", *words))
        contexts = [context(draw(moe.router, 64)) for moe in parts.model.moes]
        logits.append(parts.model(torch.arange(64).view(2, 32), contexts).logits_BSV)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[2], rtol=1e-4, atol=1e-5)


def test_noise_of_upcycling_is_relative_and_by_position():
    noisy, still, other = (bank("mlp", num=3, width=64, init="upcycled", init_noise=noise) for noise in (0.1, 0.0, 0.1))
    for (name, p), dense, again in zip(noisy.named_parameters(), still.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, again)
        assert (dense == dense[0]).all()
        apart = (p - dense).detach()
        assert (apart.std() / dense.std()).item() == pytest.approx(0.1, rel=0.1), name
        assert ((apart[0] * apart[1]).mean() / apart.var()).item() == pytest.approx(0, abs=0.15), name
    assert not torch.equal(still.w_in_EID[0, :16, :16], still.w_out_EFD[0, :16, :16] * 8)


@pytest.mark.parametrize("router", ["topk", "sigmoid_topk", "dense", "gumbel_ste"])
@pytest.mark.parametrize("granularity", [2, 4, 8])
def test_fine_grained_experts_keep_the_active_parameters(router: str, granularity: int):
    """All sizes but the router's are those of granularity 1; what runs is what the paper says."""
    words = [f"router={router}", "router.k=2", "experts.shared_experts=1", "experts.zero_experts=1"]
    coarse, fine = (assemble(tiny(*words, f"experts.granularity={g}")) for g in (1, granularity))
    before, after = cost(coarse), cost(fine)
    moe = fine.model.moes[0]
    num, k, width = oracle.split(4, 2, 32, granularity)
    assert (moe.experts.networks, moe.router.k, moe.experts.width) == (num, k, width)
    assert (after["experts"], after["experts_chosen"], after["expert_widths"]) == (num + granularity, k, [width])
    rows = 2 * 32 * (after["experts"] - before["experts"])  # of the routers: two layers, width 32
    for name, per_row in (("params", 1), ("active_params", 1), ("flops_per_token", 2), ("useful_flops_per_token", 2)):
        assert after[name] - before[name] == rows * per_row, name
    assert sum(p.numel() for p in fine.model.parameters()) - sum(p.numel() for p in coarse.model.parameters()) == rows


def test_fine_grained_experts_keep_the_limit_of_top_p():
    coarse, fine = (assemble(tiny("router=top_p", "router.most=2", f"experts.granularity={g}")) for g in (1, 4))
    assert [parts.model.moes[0].router.most_per_token() for parts in (coarse, fine)] == [2, 8]


@kinds
@cases
def test_cost_counts_what_each_expert_multiplies(kind: str, changes: dict[str, Any]):
    """Useful: the oracle's count, at even load. Executed: every network as wide as the widest."""
    words = [f"experts.{name}={str(value).replace(' ', '')}" for name, value in changes.items()]
    parts = assemble(tiny(f"experts={kind}", "router=topk", "router.k=1", *words))
    experts = parts.model.moes[0].experts
    leaves: dict[str, Tensor] = dict(experts.named_parameters())
    useful = [oracle.multiplications(*one) for one in one_by_one(kind, experts, leaves)]
    assert experts.products()[0] == useful
    told, empty = cost(parts), cost(assemble(tiny("model.moe=false")))
    k, E, layers = experts.granularity, experts.num, 2
    others = empty["useful_flops_per_token"] - 2 * layers * 3 * 32 * 32 + 2 * layers * 32 * E  # routers have E rows
    assert told["useful_flops_per_token"] == round(others + 2 * layers * k * sum(useful) / E)
    padded = (experts.sides + 1) * 32 * experts.width * experts.networks
    constant = sum(n for n, one in zip(useful, one_by_one(kind, experts, leaves), strict=True) if one[0] == "constant")
    assert told["flops_per_token"] == round(others + 2 * layers * k * (padded / E + constant))
    assert told["params"] == empty["params"] - layers * 3 * 32 * 32 + layers * (32 * E + sum(useful))


def test_a_router_that_takes_no_finer_choice_says_so(monkeypatch: pytest.MonkeyPatch):
    """Its own words about the k that runs, not the k that is asked for."""
    words = ["router=topk", "router.k=1", "experts.granularity=2"]

    def conflicts(cls: type, node: dict[str, Any], cfg: dict[str, Any]) -> list[str]:
        return [f"router.k={node['k']} of {routed(cfg)}: one at most"] if node["k"] > 1 else []

    cfg = tiny(*words)
    monkeypatch.setattr(registered("router")["topk"], "conflicts", classmethod(conflicts))
    assert check(cfg) == ["experts.granularity=2: router.k=2 of (8, 2): one at most"]
    assert check(tiny(*words[:2])) == []


@pytest.mark.parametrize(
    ("words", "most"), [(["router=top_p"], 5), (["router=top_p", "router.most=3"], 3), (["router=relu"], 5)]
)
def test_cost_says_what_it_can_come_to_where_the_data_decides(words: list[str], most: int):
    told = cost(assemble(tiny(*words, "router.k=2", "experts.zero_experts=1")))
    assert (told["experts_executed"], told["experts_executed_at_most"]) == (2, most)
    each = 2 * 2 * 3 * 32 * 32 * 4 / 5  # two layers; four experts of five have a network
    assert told["flops_per_token_at_most"] - told["flops_per_token"] == pytest.approx((most - 2) * each, abs=1)
    assert "flops_per_token_at_most" not in cost(assemble(tiny("router=topk")))
