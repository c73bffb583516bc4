"""What is hidden, what is predicted and who sees what; where the MoE layers stand; what a forward pass costs.

Shapes: B batch, S sequence, V vocabulary.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

from moe_lab import load
from moe_lab.assemble import assemble
from moe_lab.cost import cost
from moe_lab.drawing import contexts_of
from moe_lab.model.moe import MoE
from moe_lab.objectives import CLM, MLM
from moe_lab.schedules import Values
from moe_lab.seeding import generator
from moe_lab.train import train

V = 64
VALUES = Values(temperature=1.0, noise=0.0, balance=1.0, bias_rate=1.0, progress=0.0)


def test_clm_predicts_each_next_token() -> None:
    ids = torch.randint(V, (3, 9), generator=generator(0))
    inputs, targets, counted = CLM().targets(ids, V, generator(1))
    assert torch.equal(inputs, ids[:, :8]) and torch.equal(targets, ids[:, 1:]) and counted.all()


@pytest.mark.parametrize("fraction", [0.15, 0.5])
def test_mlm_hides_a_fraction_and_asks_for_it(fraction: float) -> None:
    ids = torch.randint(V, (400, 101), generator=generator(0))
    inputs, targets, counted = MLM(mask_fraction=fraction).targets(ids, V, generator(1))
    assert torch.equal(targets, ids[:, :-1])
    assert (inputs[counted] == V).all()  # the id behind the vocabulary
    assert torch.equal(inputs[~counted], targets[~counted])
    # Four standard deviations of 40,000 draws.
    assert counted.float().mean().item() == pytest.approx(fraction, abs=4 * (fraction * (1 - fraction) / 40_000) ** 0.5)
    per_place = counted.float().mean(0)
    assert per_place.std() < 0.05 and per_place.min() > 0  # everywhere in the sequence
    other = MLM(mask_fraction=fraction).targets(ids, V, generator(2))[2]
    assert not torch.equal(counted, other)


def test_mlm_hides_at_least_one_token_of_each_sequence() -> None:
    counted = MLM(mask_fraction=0.01).targets(torch.zeros(500, 9, dtype=torch.int64), V, generator(0))[2]
    assert counted.any(1).all() and counted.sum() < 600


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_who_sees_what_comes_later(objective: str) -> None:
    parts = assemble(tiny(f"objective={objective}", "router=topk"))
    assert parts.model.embed.shape[0] == V + (objective == "mlm")
    ids = torch.randint(V, (2, 32), generator=generator(0))
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % V
    with torch.no_grad():
        before, after = (parts.model(x, contexts_of(parts.model, VALUES, {}, x)).logits_BSV for x in (ids, changed))
    moved_S = (before - after).abs().amax((0, 2))
    assert (moved_S[20:] > 0).all()
    assert (moved_S[:20] > 0).all() if objective == "mlm" else torch.equal(before[:, :20], after[:, :20])


def test_masked_training_loss_is_the_mean_over_hidden_tokens(tmp_path: Path) -> None:
    cfg = tiny("objective=mlm", "router=topk", "steps=1", "optim.accumulate=2")
    train(cfg, tmp_path, [], {})
    parts = assemble(cfg)  # as it was before the update
    raw = parts.data.train_batch(0, 0, 4, 32)
    inputs, _, _ = MLM().targets(raw.ids, V, generator(0, "mask", 0))
    with torch.no_grad():
        logits_BSV = parts.model(inputs, contexts_of(parts.model, VALUES, {}, inputs)).logits_BSV
    hidden = inputs == V
    assert 0 < hidden.sum() < hidden.numel()
    expected = F.cross_entropy(logits_BSV[hidden], raw.ids[:, :-1][hidden]).item()
    assert load(tmp_path).metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("every, places", [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_every_nth_layer_is_a_moe_layer(every: int, places: list[int]) -> None:
    model = assemble(tiny("model.layers=4", f"model.moe_every={every}")).model
    assert [i for i, block in enumerate(model.blocks) if isinstance(block.feed, MoE)] == places
    assert len(model.moes) == len(places)


def test_cost_of_a_tiny_model_by_hand() -> None:
    """Width 32, two layers, 32 hidden neurons behind two gated matrices, 64 tokens, sequences of 32."""
    embed, attention, feed, norms = 64 * 32, 4 * 32 * 32, 3 * 32 * 32, 2 * 32
    weights = embed + 2 * (attention + feed + norms) + 32
    products = 2 * (32 * 32 + 32 * 32) * 2  # per token and layer: 32 queries times keys, and 32 weights times values
    dense = cost(assemble(tiny("model.moe=false")))
    flops = 2 * weights + products
    assert (dense["params"], dense["active_params"]) == (weights, weights)
    assert (dense["flops_per_token"], dense["useful_flops_per_token"]) == (flops, flops)
    moe = cost(assemble(tiny("router=topk", "router.k=2")))
    rows = 2 * 4 * 32  # of the routers
    assert moe["params"] == weights + rows + 2 * 3 * feed
    assert moe["active_params"] == weights + rows + 2 * feed
    assert moe["flops_per_token"] == 2 * moe["active_params"] + products
