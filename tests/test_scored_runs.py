"""Runs of the routers of the score-based family at their edges: finite to the end, the rows as they should be."""

from pathlib import Path

import pytest
import torch
from edges import SMALL, run

from moe_lab import seeding
from moe_lab.checkpoint import newest
from tests.command import moe_lab, tree

ROUTERS = {
    "topk mlp": ["router=topk", "router.scoring=mlp", "router.gate=normalised_sigmoid", "router.order=topk_first"],
    "cosine": ["router=cosine"],
    "lpr": ["router=lpr"],
    "top_p": ["router=top_p"],
    "sparsemixer": ["router=sparsemixer", "router.r=1"],
    "hash": ["router=hash"],
    "random": ["router=random"],
    "random fresh": ["router=random", "router.draw=fresh"],
}
every_router = pytest.mark.parametrize("router", ROUTERS)
NEVER_TRAINED = ("hash", "random", "random fresh")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@every_router
def test_one_expert(router: str) -> None:
    ran = run(*ROUTERS[router], "experts.num=1", "router.k=1")
    assert ran.each("selected") == [[16]] * 6 and set(ran.each("load_cv")) == {0}
    assert "loss" not in ran.undefined()


@every_router
def test_fewer_tokens_than_experts_in_bfloat16(router: str) -> None:
    ran = run(*ROUTERS[router], "experts.num=32", "batch_size=1", "seq_len=2", "dtype=bfloat16")
    chosen = [sum(counts) for counts in ran.each("selected")]
    k = {"topk mlp": 2, "lpr": 2}.get(router, 1)
    assert all(count >= 2 for count in chosen) if router == "top_p" else set(chosen) == {2 * k}
    for ratio in ran.rows[-1]["moe/router_grad_ratio"]:
        assert ratio is None if router in NEVER_TRAINED else ratio > 1e-4


def test_the_matrix_of_random_starts_where_that_of_topk_does_and_stays() -> None:
    """It is what any parameter of that name starts from, after training too, and the optimiser does not know it."""
    found = newest(run("router=random").folder / "checkpoints")
    assert found is not None
    rows = {name: t for name, t in found.model.items() if "router.weight_ED" in name}
    assert len(rows) == 2 and not any("router" in name for name in found.optimizer)
    for name, t in rows.items():
        start = torch.randn(t.shape, generator=seeding.generator(0, "init", name)) * 0.02
        torch.testing.assert_close(t, start, rtol=0, atol=0)


def test_a_router_with_a_loss_of_its_own_explores() -> None:
    """lpr's losses are about where prototypes lie, and not, as REINFORCE's, about who was sampled."""
    ran = run("router=lpr", "explore=[reroute,jitter]")
    assert all(row["term/router"] > 0 for row in ran.rows)


def test_top_p_is_judged_by_its_best_expert_too_and_tells_the_most_that_it_can_cost() -> None:
    """k=1 is a number to reckon with: as trained it takes more, so that the hard top-1 is another loss."""
    ran = run("router=top_p", "router.k=1", "router.p=0.9", "router.most=3")
    assert ran.rows[-1]["eval/loss_top1"] != ran.rows[-1]["eval/loss"]
    assert all(16 < sum(counts) <= 3 * 16 for counts in ran.each("selected"))
    assert ran.summary["cost"]["experts_executed_at_most"] == 3
    counts, ran_per_token = ran.rows[-1]["moe/selected"], ran.rows[-1]["moe/experts_per_token"]
    tokens = 16 * ran.rows[-1]["window"]
    assert ran_per_token == [sum(of_layer) / tokens for of_layer in counts]
    mean = sum(ran_per_token) / len(counts)
    assert ran.summary["cost"]["experts_executed_measured"] == pytest.approx(mean, rel=1e-12)


def test_what_the_capacity_took_away_did_not_run() -> None:
    ran = run("router=top_p", "router.p=0.9", "experts.capacity_factor=0.5")
    kept, tokens = ran.rows[-1]["moe/kept"], 16 * ran.rows[-1]["window"]
    assert sum(map(sum, kept)) < sum(map(sum, ran.rows[-1]["moe/selected"]))
    mean = sum(map(sum, kept)) / len(kept) / tokens
    assert ran.summary["cost"]["experts_executed_measured"] == pytest.approx(mean, rel=1e-12)


def test_what_is_known_beforehand_is_not_measured() -> None:
    ran = run("router=topk")
    assert ran.each("experts_per_token") == [2.0] * 2 * len(ran.rows)
    assert "experts_executed_measured" not in ran.summary["cost"]


CONFLICTS = {
    "router=sparsemixer router.version=v1 router.k=2": "router.version=v1 draws one expert",
    "router=top_p balance=[load] explore=[gaussian]": "balance.load: it is about the k best",
    "router=top_p explore=[reroute]": "router=top_p chooses as many experts as it takes",
    "router=hash balance=[loss_free]": "router=hash makes no choice by scores",
    "router=sparsemixer explore=[gumbel]": "router=sparsemixer has a gradient that is right for draws from its own",
    "router=cosine router.latent=1": "router.latent=1: must be at least 2",
}


@pytest.mark.parametrize("words", CONFLICTS)
def test_conflicts_are_one_line(words: str, here: Path) -> None:
    said = moe_lab("train", *SMALL, *words.split())
    assert said.code == 2 and CONFLICTS[words] in said.err and len(said.err.splitlines()) == 1, said.err
    assert tree(here) == set()
