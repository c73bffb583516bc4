"""Small runs of every balancer: one expert, fewer tokens than experts, micro-batches, and a run that went on."""

import math
from pathlib import Path

import pytest
from edges import run
from runs import STATEFUL, differences, dying_before, result
from tiny import tiny

from moe_lab.train import train

BIAS = ("router=sigmoid_topk",)
BALANCERS: dict[str, tuple[str, ...]] = {
    **{name: (f"balance=[{name}]",) for name in ("gshard", "squared_load", "kl_uniform", "variance", "seq_aux")},
    **{f"entropy of {of}": ("balance=[entropy]", f"balance.entropy.of={of}") for of in ("token", "mutual_information")},
    "erc": ("balance=[erc]",),
    "orthogonal_experts": ("balance=[orthogonal_experts]",),
    "simbal": ("balance=[simbal]", "balance.simbal.orthogonal=false"),
    "loss_free": ("balance=[loss_free]", "balance.loss_free.decay=0.1", "balance.loss_free.recentre=true", *BIAS),
    "quantile": ("balance=[quantile]", *BIAS),
    "a falling weight": ("balance=[switch]", "balance.switch.weight={curve:linear,start:0.1,end:0}"),
    **{
        f"scope {s}": ("balance=[switch]", f"balance.switch.scope={s}") for s in ("sequence", "global_batch", "running")
    },
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("edge", ["one expert", "fewer tokens than experts", "micro-batches in bf16"])
def test_runs_to_a_finite_end(name: str, edge: str):
    words = {
        "one expert": ("experts.num=1", "router.k=1"),
        "fewer tokens than experts": ("experts.num=32", "batch_size=1", "seq_len=2"),
        "micro-batches in bf16": ("optim.accumulate=2", "dtype=bfloat16", "router.k=1", "steps=4"),
    }[edge]
    if (name, edge) == ("quantile", "one expert"):
        return  # refused: there is nothing to choose
    ran = run(*words, *BALANCERS[name])
    assert all(math.isfinite(row["loss_total"]) for row in ran.rows)


def test_a_falling_weight_falls():
    ran = run(*BALANCERS["a falling weight"], "steps=5")
    terms = [row["term/switch"] for row in ran.rows]
    assert len(terms) == 5 and terms[-1] == 0
    assert terms[0] == pytest.approx(0.1, rel=0.3) and terms[2] == pytest.approx(0.05, rel=0.3)


def test_a_run_that_died_goes_on_to_the_byte(here: Path):
    """Running means, a bias, rows that started orthonormal, and what is drawn for a balancer."""
    losses = "switch,entropy,simbal,erc,quantile"
    words = (*STATEFUL, f"balance=[{losses}]", "balance.switch.scope=running", "balance.entropy.scope=global_batch")
    words += ("steps=12", "log_every=4", "eval_every=6", "checkpoint.every=5")
    train(tiny(*words), here / "whole", [], {})
    with dying_before(9):
        train(tiny(*words), here / "half", [], {})
    train(tiny(*words), here / "half", [], {})
    assert differences(result(here / "half"), result(here / "whole")) == []
