"""Tokens with none, some or all of the experts: metrics against plain loops over tokens, capacity, and curves of state.

Shapes: L layers, T tokens, E experts, K slots per token.
"""

import math
from collections import Counter

import pytest
import torch
from layers import context, make_moe, preset, randn
from tiny import loop, tiny

from moe_lab.assemble import assemble
from moe_lab.evaluate import Evaluator
from moe_lab.loop import Loop
from moe_lab.observe import dynamics
from moe_lab.observe.window import View
from moe_lab.plans import Assignments

CASES = [
    ("router=relu",),
    ("router=top_p", "router.p=0.3", "experts.capacity_factor=0.8", "objective=mlm", "optim.accumulate=2"),
    ("router=expert_choice", "allow_leak=true"),
    ("router=topk", "explore=[second_expert]", "experts.capacity_factor=0.8"),
]


def seen(*words: str) -> tuple[Loop, list[View]]:
    """Three updates, and what the recorder saw of them."""
    trained, views = loop(assemble(tiny("balance=[]", *words))), []
    see = trained.recorder.see
    trained.recorder.see = lambda view: (views.append(view), see(view))[1]  # pyright: ignore[reportAttributeAccessIssue]
    for step in range(3):
        trained.step(step)
    return trained, views


def entropy(counts: Counter) -> float:
    n = sum(counts.values())
    return -sum(c / n * math.log(c / n) for c in counts.values())


def information(pairs: list[tuple]) -> tuple[float, float]:
    """Nats between the two, and the smaller of their entropies."""
    one, other = (entropy(Counter(pair[i] for pair in pairs)) for i in (0, 1))
    return one + other - entropy(Counter(pairs)), min(one, other)


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_a_row_is_that_of_plain_loops(words: tuple[str, ...]) -> None:
    trained, views = seen(*words)
    assert trained.recorder.window is not None
    by_sequence_L = trained.recorder.window.sequence_information()[0].tolist()
    row, sizes = trained.recorder.row(), set()
    for layer in range(2):
        known, losses, first, sequence = [], {}, Counter(), 0
        for view in views:
            assert view.counted_T is not None
            for t, slots in enumerate(view.routings[layer].plan.selected_TK.tolist()):
                experts = [e for e in slots if e < 4]
                sizes.add(len(experts))
                first.update(experts[:1])
                of_token = (int(view.domain_T[t]), int(view.ids_T[t]), t % 32, sequence + t // 32)
                known += [(e, *of_token) for e in experts]
                for e in experts if view.counted_T[t] else []:
                    losses.setdefault(e, []).append(float(view.loss_T[t]))
            sequence += len(view.ids_T) // 32
        chosen = Counter(e for e, *_ in known)
        assert row["moe/selected"][layer] == [chosen[e] for e in range(4)]
        assert row["moe/top1"][layer] == [first[e] for e in range(4)]
        expected = [sum(losses[e]) / len(losses[e]) for e in range(4)]
        assert row["moe/expert_loss"][layer] == pytest.approx(expected, rel=1e-5)
        for at, name in enumerate(("domain", "token", "position"), 1):
            nats, most = information([(pair[0], pair[at]) for pair in known])
            assert row[f"moe/nmi_{name}"][layer] == pytest.approx(nats / most, abs=1e-6), name
        assert by_sequence_L[layer] == pytest.approx(information([(p[0], p[4]) for p in known])[0], abs=1e-6)
    assert len(sizes) > 1, "every token has as many experts: nothing to see"


def test_correlations_leave_out_slots_without_a_choice() -> None:
    """With slots that hold none at expert E - 1, as an index must, their scores would count."""
    parts = assemble(tiny("router=top_p", "router.p=0.3", "model.layers=1", "eval_tokens=128", "balance=[]"))
    evaluator, views = Evaluator(parts), []
    see = evaluator.probe.see
    evaluator.probe.see = lambda view: (views.append(view), see(view))[1]  # pyright: ignore[reportAttributeAccessIssue]
    row = evaluator(parts.schedules.at(0, 40))
    (moe,), pairs = parts.model.moes, []
    for view in views:
        gate_ETF = torch.einsum("td,efd->etf", view.inputs[0], moe.experts.read_in_EFD())
        activation_ET = moe.experts.neurons(torch.cat([gate_ETF, gate_ETF], -1)).mean(-1)
        z_TE, activation_ET = view.routings[0].logits_TE.detach(), activation_ET.detach()
        for t, slots in enumerate(view.routings[0].plan.selected_TK.tolist()):
            pairs += [(float(z_TE[t, e]), float(activation_ET[e, t])) for e in slots if e < 4]
    assert len(pairs) < 4 * sum(len(view.ids_T) for view in views), "no slot without a choice"
    expected = torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1]
    assert row["eval/moe/score_act_pearson"][0] == pytest.approx(float(expected), abs=1e-4)


def test_churn_counts_choices_and_no_slots_without_one() -> None:
    """Before {0}, {1, 2}, {}; now {0}, {2, 3}, {3}: two of the three are still there."""
    before, now = torch.tensor([[[0, 4], [1, 2], [4, 4]]]), torch.tensor([[[0, 4], [2, 3], [3, 4]]])
    assert dynamics.churn(before, now, 4).tolist() == pytest.approx([1 / 3])


@pytest.mark.parametrize(
    ("router", "hard", "each"), [("relu", None, 2), ("relu", 1, 1), ("topk", None, 2), ("topk", 1, 1)]
)
def test_capacity_is_counted_by_k_and_by_the_choices_that_hard_evaluation_leaves(
    router: str, hard: int | None, each: int
) -> None:
    """0.3 * 40 tokens * k / 5 experts: not by as many slots as a ragged choice has, nor by those that are cut off."""
    moe = make_moe(preset("router", router, k=2), 12, 5)
    plan = moe(randn(40, 12), context(capacity=0.3, hard=hard))[1].plan
    assert isinstance(plan, Assignments) and int(plan.selected_E.max()) > math.ceil(0.3 * 40 * each / 5)
    assert int(plan.kept_E.max()) == math.ceil(0.3 * 40 * each / 5)


@pytest.mark.parametrize("router", ["kmeans", "default_moe", "reinforce"])
def test_a_rate_that_falls_to_0_lets_the_state_of_routers_rest(router: str) -> None:
    curve = "router.rate={curve: step, start: 0.5, end: 0, until: 0.5}"
    trained = loop(assemble(tiny(f"router={router}", curve, "steps=5")))
    trained.start_from_data()
    found = []
    for step in range(5):
        trained.step(step)
        found.append({name: t.clone() for name, t in trained.parts.model.named_buffers() if "router" in name})
    moved = [any(not torch.equal(found[i][name], found[i + 1][name]) for name in found[0]) for i in range(4)]
    assert found[0] and moved == [True, False, False, False]
