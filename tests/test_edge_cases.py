"""Edges that must work: each through a real run to its end, whole, every number finite or undefined for a reason."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edges import CHOOSING, ROUTERS, SMALL, balances, run

from moe_lab.checkpoint import newest
from moe_lab.config import registered
from moe_lab.loop import Loop
from moe_lab.routing import Router, Scored
from tests.command import moe_lab, tree

# One expert leaves nothing to choose: no share of what is possible, no pair of rows, no centred centroid.
OF_ONE_EXPERT = {
    *("load_cv_of_ceiling", "load_entropy", "token_entropy", "mutual_information", "centroid_cos"),
    *("router_cos", "router_cos_abs", "coupling_mismatched", "coupling_gap"),
    *("coupling_signed_mismatched", "coupling_signed_gap", "coupling_z", "coupling_signed_z"),
}
# noisy_topk starts at zero, and with one expert or none that is used no gradient moves it: rows without a direction.
OF_ROWS_OF_ZEROS = {
    "router_cos_matrix",
    *("centroid_cos", "centroid_cos_raw", "router_cos", "router_cos_abs", "score_act_pearson", "score_act_spearman"),
    *("coupling_matched", "coupling_mismatched", "coupling_gap"),
    *("coupling_signed_matched", "coupling_signed_mismatched", "coupling_signed_gap"),
    *("coupling_z", "coupling_signed_z"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("router", ROUTERS)
def test_one_expert(router: str) -> None:
    ran = run(*ROUTERS[router], "experts.num=1", "router.k=1", balances(router))
    zeros = OF_ROWS_OF_ZEROS if router == "noisy_topk" else set()
    assert ran.undefined() == OF_ONE_EXPERT | zeros
    for name, value in {"load_cv": 0, "gate_mass_cv": 0, "max_vio": 0, "load_min_max": 1, "nmi_token": 0}.items():
        assert set(ran.each(name)) == {value}, name
    assert ran.each("selected") == [[16]] * 6 and set(ran.each("effective_experts")) == {1}
    for verdict in ran.summary["verdicts"]:
        assert (verdict["verdict"], verdict["why"]) == ("healthy", "one expert: nothing to route")


@pytest.mark.parametrize("router", ROUTERS)
def test_every_expert_chosen(router: str) -> None:
    ran = run(*ROUTERS[router], "router.k=4", balances(router))
    assert ran.undefined() == {"load_cv_of_ceiling", "centroid_cos"}
    assert ran.each("selected") == [[16] * 4] * 6 and set(ran.each("load_cv")) == {0}


@pytest.mark.parametrize("router", CHOOSING)
def test_an_expert_that_never_gets_a_token(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are zero, the optimiser's state stays zero, and it is counted as dead."""
    never(0, monkeypatch)
    ran = run(*ROUTERS[router], balances(router), "steps=5", "eval_every=5", "optim.weight_decay=0")
    assert "router_grad_ratio" not in ran.undefined() and "expert_loss" in ran.undefined()
    assert all(counts[0] == 0 and sum(counts) >= 16 for counts in ran.each("selected"))
    assert min(ran.each("dead_experts")) >= 1 and all(loss[0] is None for loss in ran.each("expert_loss"))
    checkpoint = newest(ran.folder / "checkpoints")
    assert checkpoint is not None
    assert all(t.isfinite().all() for part in (checkpoint.model, checkpoint.optimizer) for t in part.values())
    of_experts = [t for name, t in checkpoint.optimizer.items() if "exp_avg" in name and t.ndim == 3]
    assert len(of_experts) == 2 * 2 * 2  # layers, matrices, moments
    assert all(not t[0].any() and t[1:].any() for t in of_experts)


def never(expert: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No router that decides by scores chooses this expert."""
    bases = {base for cls in registered("router").values() for base in cls.__mro__}
    for cls in bases - {Router}:
        if issubclass(cls, Router) and cls.scored and "choose" in vars(cls):
            monkeypatch.setattr(cls, "choose", shunning(expert, cls.choose))


def shunning(expert: int, choose: Callable) -> Callable:
    def chosen(self, rank_TE, gates_TE, ctx):
        return choose(self, rank_TE.index_fill(1, torch.tensor([expert]), -math.inf), gates_TE, ctx)

    return chosen


@pytest.mark.parametrize("router", CHOOSING)
def test_all_tokens_dropped(router: str) -> None:
    """A capacity of less than a row: every token keeps its residual, and nothing reaches the experts or, of the
    task, the router."""
    ran = run(*ROUTERS[router], balances(router), "experts.capacity_factor=1e-9")
    assert set(ran.each("dropped_fraction")) == {1} and ran.each("kept") == [[0] * 4] * 6
    assert ran.undefined() <= {"expert_loss", "router_grad_ratio"} and "router_grad_ratio" in ran.undefined()
    checkpoint = newest(ran.folder / "checkpoints")
    assert checkpoint is not None
    of_experts = [t for name, t in checkpoint.optimizer.items() if "exp_avg" in name and t.ndim == 3]
    assert of_experts and not any(t.any() for t in of_experts)


@pytest.mark.parametrize("router", ROUTERS)
def test_fewer_tokens_than_experts(router: str) -> None:
    ran = run(*ROUTERS[router], balances(router), "experts.num=32", "batch_size=1", "seq_len=2")
    of_all = {"dead_experts"} if router in ("dense", "gumbel_softmax") else set()  # all shape each token
    few = {"expert_loss", "load_flutter_floor", "nmi_token", "nmi_token_floor"}
    assert ran.undefined() - OF_ROWS_OF_ZEROS <= few | of_all
    assert all(sum(top1) == 2 for top1 in ran.each("top1"))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_sequences_of_one_token(objective: str, batch: int) -> None:
    ran = run("seq_len=1", f"batch_size={batch}", f"objective={objective}", "steps=4")
    assert {"nmi_position", "nmi_position_floor"} <= ran.undefined()
    assert ran.rows[-1]["tokens"] == 4 * batch and ran.rows[-1]["eval/tokens"] > 0


def test_a_dataset_of_one_block_trains_without_validation(here: Path) -> None:
    ran = run("dataset.tokens=9")
    (line,) = ran.said.splitlines()
    assert "validation is off" in line and "9 tokens" in line and "seq_len+1 = 9" in line
    assert ran.summary["valid_tokens"] == 0 and ran.summary["eval"] == {}
    assert not [name for row in ran.rows for name in row if name.startswith("eval/")]
    assert all(row["moe/router_grad_ratio"] for row in (ran.rows[0], ran.rows[-1]))  # on a training batch
    assert "validation is off" in (ran.folder / "train.log").read_text()


@pytest.mark.parametrize("name", ["clusters", "text"])
def test_less_than_one_block_is_refused_with_the_numbers(name: str, here: Path) -> None:
    (here / "a.txt").write_text("1234567")  # and a closing newline
    data = {"clusters": ["dataset.tokens=8"], "text": ["dataset=text", "dataset.paths=[a.txt]"]}[name]
    words = [word for word in SMALL if not word.startswith("dataset")]
    before = tree(here)
    said = moe_lab("train", *words, f"dataset={name}", *[word for word in data if word != f"dataset={name}"])
    assert said.code == 2 and said.out == "" and len(said.err.splitlines()) == 1
    assert "8" in said.err and "seq_len+1 = 9" in said.err and "7" in said.err
    assert tree(here) == before


def test_a_text_of_one_character(here: Path) -> None:
    (here / "a.txt").write_text("a" * 500)
    words = [word for word in SMALL if not word.startswith("dataset")]
    said = moe_lab("train", *words, "dataset=text", "dataset.paths=[a.txt]", "steps=20", "optim.lr=0.01")
    assert said.code == 0, said.err
    (folder,) = Path("outputs").glob("*/*")
    assert moe_lab("verify", str(folder)).code == 0


@pytest.mark.parametrize("words", ["dataset.domains=1", "dataset.vocab_size=2 dataset.branching=1 dataset.domains=1"])
def test_little_to_tell(words: str) -> None:
    ran = run(*words.split())
    assert all(value is None for value in ran.each("nmi_domain"))
    assert ran.undefined() <= {"expert_loss", "nmi_token", "nmi_token_floor", "centroid_cos"}


EXTREMES = {
    "temperature 1e-30": ["schedule.temperature=1e-30"],
    "temperature 1e30": ["schedule.temperature=1e30"],
    "noise 1e30": ["schedule.noise=1e30"],
    "balance 1e30": ["schedule.balance=1e30"],
    "bias rate 1e30": ["schedule.bias_rate=1e30"],
    "lr 1e30": ["optim.lr=1e30"],
    "no clip": ["optim.clip=null", "optim.lr=1000"],
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("router", ["noisy_topk", "gumbel_ste", "sigmoid_topk"])
def test_extremes_end_finite_or_diverged(router: str, extreme: str, here: Path) -> None:
    finite_or_diverged(here, *ROUTERS[router], balances(router), *EXTREMES[extreme])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("router", ROUTERS)
def test_logits_ten_thousand_times_as_large(
    router: str, dtype: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Scored.score
    monkeypatch.setattr(Scored, "score", lambda self, x_TD, ctx: 1e4 * score(self, x_TD, ctx))
    finite_or_diverged(here, *ROUTERS[router], balances(router), f"dtype={dtype}")


def finite_or_diverged(here: Path, *words: str) -> None:
    """To the end with finite losses, or exit code 3 with a line, without a checkpoint of what is not finite."""
    said = moe_lab("train", *SMALL, *words)
    assert said.code in (0, 3) and "Traceback" not in said.err, said.err
    (folder,) = Path("outputs").glob("*/*")
    assert moe_lab("verify", str(folder)).code == 0
    found = newest(folder / "checkpoints")
    assert (found is not None) == (said.code == 0)
    if found is not None:
        assert all(t.isfinite().all() for t in found.model.values())
    else:
        assert said.err.startswith("moe-lab: diverged: ") and len(said.err.splitlines()) == 1


def test_a_loss_that_is_not_finite_is_exit_code_3(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Loop.step

    def poisoned(self: Loop, at: int) -> None:
        if at == 1:
            with torch.no_grad():
                self.parts.model.norm.gain_D.fill_(math.inf)
        step(self, at)

    monkeypatch.setattr(Loop, "step", poisoned)
    ran = run(code=3)
    assert ran.said == (
        "moe-lab: diverged: the loss or the gradient of update 2 is not finite; that update was not applied. "
        "Try a smaller optim.lr\n"
    )
    assert ran.summary["status"] == "diverged" and [row["step"] for row in ran.rows] == [1]
    assert not (ran.folder / "checkpoints").exists()
