"""What an evaluation says, against the same network with its MoE layers written as a loop over tokens' experts.

Shapes: T tokens, D width, E experts, F hidden, K kept per token, B batch, S sequence, V vocabulary.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny
from torch import Tensor, nn

from moe_lab import load
from moe_lab.assemble import assemble
from moe_lab.evaluate import Evaluator
from moe_lab.model.moe import MoE
from moe_lab.model.transformer import Transformer
from moe_lab.parts import Parts
from moe_lab.schedules import Values
from moe_lab.train import train


class Naive(nn.Module):
    """A MoE layer without noise: softmax, the `keep` most probable experts, their probabilities made to sum to one."""

    def __init__(self, moe: MoE, temperature: float, keep: int):
        super().__init__()
        self.router_ED = moe.router.weight_ED
        self.w_in_EID, self.w_out_EFD = moe.experts.w_in_EID, moe.experts.w_out_EFD
        self.temperature, self.keep = temperature, keep

    def forward(self, x_TD: Tensor) -> Tensor:
        prob_TE = (x_TD @ self.router_ED.T / self.temperature).softmax(-1)
        least_T = prob_TE.sort(-1, descending=True).values[:, self.keep - 1]
        weight_TE = torch.where(prob_TE >= least_T[:, None], prob_TE, 0)
        weight_TE = weight_TE / weight_TE.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for e in range(weight_TE.shape[1]):
            gate_TF, up_TF = (x_TD @ self.w_in_EID[e].T).chunk(2, -1)
            y_TD += weight_TE[:, e, None] * ((F.silu(gate_TF) * up_TF) @ self.w_out_EFD[e])
        return y_TD


@torch.no_grad()
def naive_loss(model: Transformer, parts: Parts, temperature: float, keep: int) -> float:
    """Mean next-token loss of the validation batches."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.feed = Naive(block.feed, temperature, keep)  # pyright: ignore[reportArgumentType]
    losses = []
    s = parts.settings
    for raw in parts.data.valid_batches(s.batch_size, s.seq_len, s.eval_tokens):
        logits_BSV = model(raw.ids[:, :-1], []).logits_BSV
        losses.append(F.cross_entropy(logits_BSV.flatten(0, 1), raw.ids[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).double().mean().item()


def decided(*overrides: str) -> Parts:
    """A model whose routers and experts matter as much as after training."""
    parts = assemble(tiny(*overrides))
    with torch.no_grad():
        for moe in parts.model.moes:
            moe.router.weight_ED.mul_(30)
            moe.experts.w_out_EFD.mul_(5)
        parts.model.embed.mul_(10)
    return parts


VALUES = Values(temperature=0.7, noise=1.0, balance=1.0, bias_rate=1.0, progress=0.0)
ROUTERS = {  # and how many experts shape the output as trained
    "dense": (["router=dense", "router.k=2"], 4),
    "soft sample": (["router=gumbel_softmax", "router.k=2"], 4),
    "hard": (["router=topk", "router.k=2"], 2),
    "hard with noise": (["router=topk", "router.k=2", "explore=[gumbel]"], 2),
}


@pytest.mark.parametrize("router", ROUTERS)
def test_losses_as_trained_and_with_hard_choices(router: str) -> None:
    overrides, trained = ROUTERS[router]
    parts = decided(*overrides)
    row = Evaluator(parts)(VALUES)
    expected = {keep: naive_loss(parts.model, parts, VALUES.temperature, keep) for keep in (1, 2, 4)}
    found = {"eval/loss": trained, "eval/loss_top1": 1, "eval/loss_topk": 2}
    assert {key: row[key] for key in found} == pytest.approx({key: expected[n] for key, n in found.items()}, rel=1e-5)
    gaps = [abs(expected[a] - expected[b]) / expected[b] for a, b in ((1, 2), (1, 4), (2, 4))]
    assert min(gaps) > 1e-3  # the three could not stand for one another


@pytest.mark.parametrize("router", ["gumbel_ste", "noisy_topk", "gumbel_softmax"])
def test_an_evaluation_has_no_noise_and_can_be_repeated(router: str) -> None:
    parts = decided(f"router={router}")
    loud, silent = (Values(temperature=0.7, noise=n, balance=1.0, bias_rate=1.0, progress=0.0) for n in (50.0, 0.0))
    evaluator = Evaluator(parts)
    first, again, quiet = evaluator(loud), evaluator(loud), evaluator(silent)
    said = ("eval/loss", "eval/loss_top1", "eval/loss_topk", "eval/moe/selected", "eval/moe/importance")
    assert {key: first[key] for key in said} == {key: again[key] for key in said}
    assert {key: first[key] for key in said} == {key: quiet[key] for key in said}


def test_an_evaluation_uses_the_schedules_of_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    evaluate = Evaluator.__call__

    def listen(self: Evaluator, values: Values) -> dict[str, Any]:
        asked.append(values.temperature)
        return evaluate(self, values)

    monkeypatch.setattr(Evaluator, "__call__", listen)
    moving = ["curve=linear", "start=50", "end=0.01"]
    cfg = tiny(
        "router=dense", "steps=6", "eval_every=2", "optim.lr=0.03", *(f"schedule.temperature.{x}" for x in moving)
    )
    train(cfg, tmp_path, [], {})
    rows = [row for row in load(tmp_path).metrics if "eval/loss" in row]
    assert asked == [row["knob/temperature"] for row in rows] == pytest.approx([50 - 49.99 * x for x in (0.2, 0.6, 1)])
    model, parts = load(tmp_path).model, assemble(cfg)
    first, last = (naive_loss(model, parts, temperature, 4) for temperature in (50, 0.01))
    assert rows[-1]["eval/loss"] == pytest.approx(last, rel=1e-5)
    assert abs(first - last) / last > 1e-4


@pytest.mark.parametrize("objective", ["clm", "mlm"])
@pytest.mark.parametrize("wanted", [100, 2048])
def test_as_many_tokens_as_asked_for_carry_a_loss(objective: str, wanted: int) -> None:
    parts = assemble(tiny(f"objective={objective}", f"eval_tokens={wanted}"))
    tokens = Evaluator(parts)(VALUES)["eval/tokens"]
    domains, S = 8, 32  # each domain may bring one block more
    assert wanted <= tokens <= 1.5 * wanted + (1 + domains) * S


def test_masked_evaluation_is_the_mean_over_hidden_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = assemble(tiny("objective=mlm", "router=topk", "router.k=1"))
    originals: list[Tensor] = []
    forwards: list[tuple[Tensor, Tensor]] = []
    batches = parts.data.valid_batches

    def listen(*args: int) -> Iterator[Any]:
        for raw in batches(*args):
            originals.append(raw.ids[:, :-1])
            yield raw

    monkeypatch.setattr(parts.data, "valid_batches", listen)
    parts.model.register_forward_hook(lambda _, args, out: forwards.append((args[0], out.logits_BSV.detach())))
    row = Evaluator(parts)(VALUES)
    total, hidden = 0.0, 0
    # The last batch and the last forward belong to the liveness probe.
    for ids_BS, (shown_BS, logits_BSV) in zip(originals[:-1], forwards[:-1], strict=True):
        mask_BS = shown_BS == parts.data.vocab_size
        total += F.cross_entropy(logits_BSV[mask_BS], ids_BS[mask_BS], reduction="sum").item()
        hidden += int(mask_BS.sum())
    assert row["eval/tokens"] == hidden
    assert row["eval/loss"] == pytest.approx(total / hidden, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "live"),
    [(("router=lpr", "router.k=1"), False), (("router=lpr", "router.k=2"), True), (("router=reinforce",), True)],
)
def test_liveness_is_about_the_task(words: tuple[str, ...], live: bool) -> None:
    """lpr's own losses train its prototypes whatever the task says; reinforce learns of the task by its own alone."""
    ratio = Evaluator(assemble(tiny(*words))).alive(VALUES)["moe/router_grad_ratio"]
    assert all((r > 1e-2) if live else (r < 1e-4) for r in ratio)
