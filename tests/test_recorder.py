"""The recorder on views made by hand: additive windows, plain rows, resumable state, nothing undefined that is known.

Shapes: L layers, T tokens, E experts, K chosen per token, D width.
"""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lab.model.experts import SwiGLU
from moe_lab.model.moe import MoE
from moe_lab.observe import load
from moe_lab.observe.metric import METRICS
from moe_lab.observe.probe import Probe, mean_activation
from moe_lab.observe.recorder import Recorder, View
from moe_lab.observe.window import MEMORY
from moe_lab.routers.topk import TopK
from moe_lab.routing import Assignments, Mixture, Plan, Routing
from moe_lab.seeding import generator, initialise

L, E, D, S, DOMAINS, VOCABULARY = 2, 4, 8, 8, 3, 10


def moes(k: int = 1) -> list[MoE]:
    layers = torch.nn.ModuleList([MoE(TopK(D, E, k=k), SwiGLU(D, L, num=E, width=16), L) for _ in range(L)])
    initialise(layers, 0)
    return [layer for layer in layers if isinstance(layer, MoE)]


def recorder(k: int = 1) -> Recorder:
    return Recorder(moes(k), VOCABULARY, DOMAINS, S, "cpu")


def view(expert_TK: Tensor, logits_TE: Tensor | None = None, seed: int = 0, **more: Any) -> View:
    """The same choices in both layers; everything else random, unless given."""
    g = generator(seed, "view")
    T, K = expert_TK.shape
    logits_TE = torch.randn(T, E, generator=g) if logits_TE is None else logits_TE
    plan = Assignments(expert_TK, torch.full((T, K), 1 / K), E)
    routing = Routing(plan, logits_TE, logits_TE.softmax(-1))
    inputs = tuple(torch.randn(T, D, generator=g) for _ in range(L))
    ids_T, domain_T = torch.randint(VOCABULARY, (T,), generator=g), torch.randint(DOMAINS, (T,), generator=g)
    return View((routing,) * L, inputs, ids_T, domain_T, S, torch.rand(T, generator=g), **more)


def choices(T: int, K: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(T, E, generator=generator(seed, "choices")).topk(K, -1).indices


def cut(whole: View, parts: int) -> list[View]:
    """A view as micro-batches of one update."""
    T = len(whole.ids_T) // parts
    found = []
    for i in range(parts):
        at = slice(i * T, (i + 1) * T)
        routings = []
        for r in whole.routings:
            assert isinstance(r.plan, Assignments)
            plan = Assignments(r.plan.expert_TK[at], r.plan.weight_TK[at], E)
            routings.append(Routing(plan, r.logits_TE[at], r.probs_TE[at]))
        inputs = tuple(x[at] for x in whole.inputs)
        rest = (whole.ids_T[at], whole.domain_T[at], S, whole.loss_T[at])
        found.append(View(tuple(routings), inputs, *rest, closes=i == parts - 1))
    return found


def test_a_row_is_plain_complete_and_named():
    r = recorder()
    for seed in range(2):
        r.see(view(choices(64, seed=seed), seed=seed))
        row = r.row(held={m.name: torch.ones(L) for m in METRICS.values() if m.when == "balancer"})
    evaluation = Probe(moes())
    evaluation.see(view(choices(64)))
    row |= evaluation.row()
    r.see(view(choices(64)))
    row |= r.row(evaluation=True)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    for name, metric in METRICS.items():
        if metric.when == "liveness":
            continue  # computed by probes/liveness.py
        values = row[f"moe/{name}"]
        assert len(values) == L
        if metric.shape == "LE":
            assert [len(v) for v in values] == [E, E]
        elif metric.shape != "L":
            last = {"LEE": E, "LEC": DOMAINS}[metric.shape]
            assert [[len(v) for v in of_expert] for of_expert in values] == [[last] * E] * L
        else:
            assert (f"moe/{name}/worst" in row) == (metric.worst is not None) and f"moe/{name}/mean" in row
    assert {key.split("/")[1] for key in row} == {m.name for m in METRICS.values() if m.when != "liveness"}
    assert all(isinstance(n, int) for counts in row["moe/selected"] for n in counts)


def test_counts_and_means_by_hand():
    """Eight tokens, four to expert 0, three to 1, one to 2; logits 0: a uniform gate."""
    v = view(torch.tensor([[0], [0], [0], [1], [1], [2], [0], [1]]), torch.zeros(8, E))
    r = recorder()
    r.see(v)
    row = r.row()
    assert row["moe/selected"] == row["moe/kept"] == row["moe/top1"] == [[4, 3, 1, 0]] * L
    assert row["moe/dropped"] == [[0] * E] * L and row["moe/dead_experts"] == [1, 1]
    assert row["moe/importance"] == [[0.25] * E] * L and row["moe/importance_cv"] == [0, 0]
    assert row["moe/gate_mass"] == [[4, 3, 1, 0]] * L
    assert row["moe/token_entropy"] == pytest.approx([1, 1]) and row["moe/logsumexp"] == pytest.approx(
        [math.log(4)] * 2
    )
    assert row["moe/logit_norm"] == [0, 0] and row["moe/mutual_information"] == pytest.approx([0, 0], abs=1e-6)
    # mean 2, variance (4 + 1 + 1 + 4) / 4
    assert row["moe/load_cv"] == pytest.approx([math.sqrt(2.5) / 2] * 2)
    loss = row["moe/expert_loss"][0]
    assert loss[:3] == pytest.approx([v.loss_T[own].mean().item() for own in ([0, 1, 2, 6], [3, 4, 7], [5])])
    assert loss[3] is None


def test_tokens_without_a_loss_do_not_count_for_it():
    v = view(choices(64))
    counted = torch.arange(64) % 2 == 0
    masked = View(v.routings, v.inputs, v.ids_T, v.domain_T, S, v.loss_T * counted, counted)
    r = recorder()
    r.see(masked)
    mine = (v.routings[0].plan.selected_TK[:, 0] == 1) & counted
    assert r.row()["moe/expert_loss"][0][1] == pytest.approx(v.loss_T[mine].mean().item())


@pytest.mark.parametrize("K", [1, 2])
def test_micro_batches_add_up(K: int):
    whole = view(choices(256, K))
    one, four = recorder(K), recorder(K)
    one.see(whole)
    for part in cut(whole, 4):
        four.see(part)
    a, b = one.row(), four.row()
    assert a.keys() == b.keys()
    for key in a:
        assert flat(a[key]) == pytest.approx(flat(b[key]), rel=1e-5, abs=1e-9), key


def flat(values: Any) -> list[float]:
    if isinstance(values, list):
        return [x for v in values for x in flat(v)]
    return [-1.0 if values is None else values]


def test_the_mean_of_ratios_is_another_number():
    """Two micro-batches, each all on one expert of four, but on different ones. Each CV is sqrt(3) = 1.73, and so is
    their mean; the update's counts are 32, 32, 0, 0 with a CV of 1 (with eight experts: 2.65 and 1.73)."""
    r = recorder()
    parts = [view(torch.full((32, 1), e), closes=e == 1) for e in (0, 1)]
    each = [load.cv(p.routings[0].plan.selected_E[None]).item() for p in parts]
    assert each == pytest.approx([math.sqrt(3)] * 2)
    for part in parts:
        r.see(part)
    assert r.row()["moe/load_cv"] == pytest.approx([1, 1])


def test_capacity_top_1_and_soft_mass():
    """k = 2 with a capacity of 2 per expert: choices (0, 1) six times and (2, 3) twice."""
    expert_TK = torch.tensor([[0, 1]] * 6 + [[2, 3]] * 2)
    v = view(expert_TK)
    plan = Assignments(expert_TK, torch.full((8, 2), 0.5), E).limit(0.5)
    row = see_plan(v, plan)
    assert row["moe/selected"][0] == [6, 6, 2, 2] and row["moe/kept"][0] == [2, 2, 2, 2]
    assert row["moe/dropped_fraction"][0] == 0.5 and row["moe/top1"][0] == [6, 0, 2, 0]
    mixture = Mixture(torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(8, 1), torch.zeros(8, 1, dtype=torch.int64))
    row = see_plan(v, mixture, k=1)
    assert row["moe/selected"][0] == [8, 0, 0, 0]
    assert row["moe/gate_mass"][0] == pytest.approx([3.2, 2.4, 1.6, 0.8])


def see_plan(v: View, plan: Plan, k: int = 2) -> dict[str, Any]:
    routing = Routing(plan, v.routings[0].logits_TE, v.routings[0].probs_TE)
    r = recorder(k)
    r.see(View((routing,) * L, v.inputs, v.ids_T, v.domain_T, S, v.loss_T))
    return r.row()


def test_an_expert_that_is_its_domain_its_token_or_its_position():
    domain_T = torch.arange(64) // 8 % DOMAINS  # a sequence each
    v = view(domain_T[:, None])
    r = recorder()
    r.see(View(v.routings, v.inputs, torch.zeros_like(domain_T), domain_T, S, v.loss_T))
    row = r.row()
    assert row["moe/nmi_domain"] == pytest.approx([1, 1])
    assert row["moe/nmi_token"] == [None, None]  # one token: nothing to tell
    assert row["moe/nmi_position"] == pytest.approx([0, 0], abs=1e-9)
    position = view((torch.arange(64) % S // 2)[:, None])
    r.see(position)
    assert r.row()["moe/nmi_position"] == pytest.approx([1, 1])
    r.see(View(position.routings, v.inputs, (torch.arange(64) % S), domain_T, S, v.loss_T))
    assert r.row()["moe/nmi_token"] == pytest.approx([1, 1])


def test_dead_experts_look_back_over_a_hundred_updates():
    r, everyone, no_last = recorder(), view(torch.arange(64)[:, None] % E), view(torch.arange(64)[:, None] % (E - 1))
    found = []
    for update in range(120):
        r.see(everyone if update < 10 else no_last)
        found += r.row()["moe/dead_experts"][:1]
    # 10 updates with 16 tokens of 64: below 1 % of the mean only when all of them have left the window of 100
    assert found[:110] == [0] * 109 + [1] and found[110:] == [1] * 10


def test_movement_between_updates_and_windows():
    r = recorder()
    to, fro = view(torch.zeros(64, 1, dtype=torch.int64)), view(torch.ones(64, 1, dtype=torch.int64))
    for v in (to, fro, to, fro):
        r.see(v)
    first = r.row()
    assert first["moe/load_flutter"] == [1, 1] and first["moe/load_flutter_floor"] == [0, 0]
    assert first["moe/load_shift"] == [None, None]
    for v in (to, fro):
        r.see(v)
    second = r.row()
    assert second["moe/load_flutter"] == [1, 1] and second["moe/load_shift"] == [0, 0]  # inside, not between


def test_centroids_forget():
    """A row that points at the tokens of long ago: after 69 updates of others, the old ones are half of the mean."""
    r = recorder()
    assert r.window is not None
    v = view(torch.zeros(64, 1, dtype=torch.int64))
    ones, minus = (
        View(v.routings, (x,) * L, v.ids_T, v.domain_T, S, v.loss_T) for x in (torch.ones(64, D), -torch.ones(64, D))
    )
    for _ in range(69):
        r.see(ones)
    weight = r.window.running["centroid_count"][0, 0].item()
    for _ in range(69):
        r.see(minus)
    old = (r.window.running["centroid_count"] + r.window.running["centroid_sum"][..., 0])[0, 0].item() / 2
    assert old / weight == pytest.approx(0.5, rel=0.01)


def test_centroids_sample_large_batches_and_come_round_to_every_token():
    """256 tokens per expert of 1024: a quarter of the batch, and another one at each update."""
    r = recorder()
    assert r.window is not None
    v = view(choices(1024 * E))
    x_TD = torch.eye(D)[torch.arange(1024 * E) % 4]  # the quarter that a token is in
    for update in range(4):
        r.see(View(v.routings, (x_TD,) * L, v.ids_T, v.domain_T, S, v.loss_T))
        seen_LD = r.window.running["centroid_sum"].sum(1) > 0
        assert seen_LD.tolist() == [[quarter <= update for quarter in range(D)]] * L
        assert r.window.running["centroid_count"][0].sum() == pytest.approx(
            256 * E * sum(MEMORY ** (i + 1) for i in range(update + 1))
        )


def test_resume_in_the_middle_of_a_window():
    def run(stop: int | None) -> list[dict]:
        r, rows = recorder(2), []
        for update in range(12):
            if update == stop:
                state = {name: t.clone() for name, t in r.state().items()}
                r = recorder(2)
                r.load_state(state)
            for part in cut(view(choices(64, 2, seed=update), seed=update), 2):
                r.see(part)
            if update % 5 == 4:
                rows.append(r.row())
        return [*rows, r.row()]

    assert run(None) == run(7) == run(2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_seeing_on_a_gpu_never_waits_and_gives_the_row_of_the_cpu():
    v, there = view(choices(64)), recorder()
    logits, ids, domain, loss = (t.cuda() for t in (v.routings[0].logits_TE, v.ids_T, v.domain_T, v.loss_T))
    plan = Assignments(v.routings[0].plan.selected_TK.cuda(), torch.ones(64, 1).cuda(), E)
    routing = Routing(plan, logits, logits.softmax(-1))
    seen = View((routing,) * L, tuple(x.cuda() for x in v.inputs), ids, domain, S, loss)
    layers = [moe.cuda() for moe in moes()]
    here = Recorder(layers, VOCABULARY, DOMAINS, S, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    here.see(seen)
    torch.cuda.set_sync_debug_mode("default")
    there.see(v)
    a, b = here.row(), there.row()
    assert a.keys() == b.keys() and all(flat(a[key]) == pytest.approx(flat(b[key]), rel=1e-4, abs=1e-6) for key in a)


def test_no_layers_no_keys():
    r = Recorder([], VOCABULARY, DOMAINS, S, "cpu")
    r.see(View((), (), torch.zeros(8), torch.zeros(8), S, torch.zeros(8)))
    assert r.row() == {} and r.state() == {} and Probe([]).row() == {}
    r.load_state({})


def test_an_evaluation_has_no_movement():
    r = recorder()
    r.see(view(choices(64)))
    row = r.row(evaluation=True)
    assert not [key for key in row if METRICS[key.split("/")[1]].when not in ("row", "evaluation")]


def test_the_matrices_of_an_evaluation():
    """Who serves which domain sums to the load; the cosines are those of the rows, and their mean is router_cos."""
    layers, v = moes(), view(choices(64))
    r = Recorder(layers, VOCABULARY, DOMAINS, S, "cpu")
    r.see(v)
    row = r.row(evaluation=True)
    chosen_T = v.routings[0].plan.selected_TK[:, 0]
    by_hand = [[int(((chosen_T == e) & (v.domain_T == c)).sum()) for c in range(DOMAINS)] for e in range(E)]
    assert row["moe/domain_counts"] == [by_hand] * L
    for layer, moe in enumerate(layers):
        rows_ED = moe.router.directions_ED()
        assert rows_ED is not None
        cosines = row["moe/router_cos_matrix"][layer]
        one, other = rows_ED[1].tolist(), rows_ED[3].tolist()
        by_hand = sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)
        assert cosines[1][3] == cosines[3][1] == pytest.approx(by_hand, abs=1e-4) and cosines[2][2] == 1
        pairs = [cosines[e][g] for e in range(E) for g in range(e)]
        assert row["moe/router_cos"][layer] == pytest.approx(sum(pairs) / len(pairs), abs=1e-4)


@pytest.mark.parametrize("most, there", [(E - 1, False), (E, True)])
def test_a_row_stays_small_with_many_experts(monkeypatch: pytest.MonkeyPatch, most: int, there: bool):
    monkeypatch.setattr("moe_lab.observe.recorder.MOST_EXPERTS", most)
    r = recorder()
    r.see(view(choices(64)))
    row = r.row(evaluation=True)
    assert {name: f"moe/{name}" in row for name in ("router_cos_matrix", "domain_counts")} == {
        "router_cos_matrix": there,
        "domain_counts": there,
    }


def test_coupling_is_that_of_the_weights_as_they_stand():
    layers = moes()
    with torch.no_grad():
        for moe in layers:
            moe.experts.w_in_EID[:, :16] = moe.router.weight_ED[:, None]
    recorder = Recorder(layers, VOCABULARY, DOMAINS, S, "cpu")
    recorder.see(view(choices(64, 2)))
    assert recorder.row()["moe/coupling_matched"] == pytest.approx([1, 1])


def test_scores_against_activations():
    """Activations that grow with the score: every neuron reads along its router row."""
    layers = moes()
    with torch.no_grad():
        for moe in layers:
            moe.experts.w_in_EID[:, :16] = moe.router.weight_ED[:, None]
    x_TD = torch.randn(64, D, generator=generator(0, "x"))
    selected_TK = choices(64, 2)
    scores = (x_TD @ layers[0].router.weight_ED.T).gather(1, selected_TK).flatten()
    got = mean_activation(layers[0], x_TD, selected_TK)
    assert torch.allclose(got, torch.nn.functional.silu(scores).double(), atol=1e-6)
    probe = Probe(layers)
    logits_TE = x_TD @ layers[0].router.weight_ED.T
    v = view(selected_TK, logits_TE)
    probe.see(View(v.routings, (x_TD,) * L, v.ids_T, v.domain_T, S, v.loss_T))
    row = probe.row()
    assert row["moe/score_act_spearman"][0] > 0.9


def test_churn_from_one_evaluation_to_the_next_and_across_a_resume():
    probe, now = Probe(moes()), choices(64)
    probe.see(view(now))
    assert probe.row()["moe/churn"] == [None, None]
    moved = now.clone()
    moved[:16] = (moved[:16] + 1) % E
    resumed = Probe(moes())
    resumed.load_state(probe.state())
    for p in (probe, resumed):
        p.see(view(moved))
        assert p.row()["moe/churn"] == [0.25, 0.25]
