"""Routers and balancers with state: a run that died and went on is the run that did not, to the byte."""

import copy
from pathlib import Path

import pytest
import torch
from runs import STATEFUL, differences, dying_before, result
from tiny import loop, tiny

from moe_lab.assemble import assemble
from moe_lab.checkpoint import newest
from moe_lab.observe.window import View
from moe_lab.train import train

# A checkpoint after update 6, of 14; it dies in update 9, between two rows.
WORDS = [word for word in STATEFUL if not word.startswith(("router", "explore", "balance", "experts.capacity_factor"))]
WORDS += ["steps=14", "log_every=5", "eval_every=7", "checkpoint.every=6"]
CASES = {
    "reinforce": (["router=reinforce", "balance=[loss_free]"], "router.running_2"),
    "reinforce mean": (["router=reinforce", "router.baseline=mean", "router.k=2"], "router.running_2"),
    "default_moe": (["router=default_moe", "experts.capacity_factor=1.0"], "router.mean_ED"),
    "kmeans": (["router=kmeans", "balance=[loss_free]"], "router.mean_ED"),
    "relu": (["router=relu", "balance=[l1_adaptive]", "balance.l1_adaptive.start=1.0"], "l1_adaptive.0.strength"),
}


def run(words: list[str], folder: Path) -> dict[str, bytes]:
    train(copy.deepcopy(tiny(*WORDS, *words)), folder, [], {})
    return result(folder)


def dead(words: list[str], folder: Path) -> Path:
    with dying_before(9):
        run(words, folder)
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    found = newest(folder / "checkpoints")
    assert found is not None and found.step == 6
    return found.model | found.state


@pytest.mark.parametrize("case", CASES)
def test_going_on_is_exact(case: str, tmp_path: Path) -> None:
    words, piece = CASES[case]
    whole = run(words, tmp_path / "whole")
    folder = dead(words, tmp_path / "half")
    assert any(name.endswith(piece) and t.any() for name, t in state(folder).items()), "nothing there to forget"
    assert differences(run(words, folder), whole) == []


@pytest.mark.parametrize("case", CASES)
def test_without_its_state_it_is_another_run(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: half of what was saved, in the place of it."""
    words, piece = CASES[case]
    whole = run(words, tmp_path / "whole")
    folder = dead(words, tmp_path / "half")
    take = newest

    def forgetful(home: Path, fits) -> object:
        def halved(found):
            for kept in (found.model, found.state):
                for name in kept:
                    if name.endswith(piece):
                        kept[name] = kept[name] / 2
            return fits(found)

        return take(home, halved)

    monkeypatch.setattr("moe_lab.checkpoint.newest", forgetful)
    assert "metrics.jsonl" in differences(run(words, folder), whole)


@pytest.mark.parametrize("case", ["default_moe", "kmeans", "relu"])
def test_micro_batches_change_nothing(case: str, tmp_path: Path) -> None:
    """Statistics are summed over the update: the state after it is that of one big batch, but for rounding.

    The weights hardly move, or AdamW would make large steps of small differences.
    """
    words, piece = CASES[case]
    words = [word for word in words if "capacity" not in word] + ["balance.l1_adaptive.load=false"] * (case == "relu")
    found = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        train(tiny(*WORDS, *words, f"optim.accumulate={parts}", "steps=6", "optim.lr=1e-6"), folder, [], {})
        found.append({name: t for name, t in state(folder).items() if name.endswith(piece)})
    assert found[0]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_micro_batches_with_different_numbers_of_hidden_tokens_change_no_policy_gradient() -> None:
    """objective=mlm: a token weighs as much as in one big batch, in the router's objective as in the task's loss."""
    found, counts = [], []
    for parts in (1, 4):
        trained = loop(assemble(tiny("router=reinforce", "objective=mlm", "balance=[]", f"optim.accumulate={parts}")))
        gradients: dict[str, torch.Tensor] = {}
        see, weights = trained.recorder.see, dict(trained.parts.model.named_parameters())

        def keep(lr: float, bad: torch.Tensor, into=gradients, of=weights) -> None:
            into |= {name: p.grad.clone() for name, p in of.items() if p.grad is not None}

        def count(view: View, see=see) -> None:
            assert view.counted_T is not None
            counts.append(int(view.counted_T.sum()))
            see(view)

        trained.optimizer.step, trained.recorder.see = keep, count  # pyright: ignore[reportAttributeAccessIssue]
        trained.step(3)
        found.append(gradients)
    assert len(set(counts[1:])) > 1, "as many in each micro-batch: nothing to see"
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)
