"""What a baseline saves: the variance of the router's policy gradient over many draws of the experts, on fixed tokens.

One MoE layer with nothing but the output head behind it, so that a token's loss hangs on its own choice alone and the
gradient of the expected loss is known: every expert is run on every token. The same draws for every baseline, no
entropy bonus. "each token's expected loss" is what a perfect critic would say. A batch that was not trained on.
"""

import os
import tempfile
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness import single_thread
from benchmarks.step import loop
from moe_lab import seeding
from moe_lab.drawing import Drawn, contexts, draw
from moe_lab.loop import Loop, forward
from moe_lab.parts import Examples, examples
from moe_lab.routers.reinforce import Reinforce
from moe_lab.schedules import Values

MODEL = ["router=reinforce", "balance=[]", "model.layers=1", "model.dim=64", "experts.num=8", "experts.width=64"]
MODEL += ["batch_size=16", "seq_len=64", "steps=1000", "optim.lr=0.003"]
DATA = ["dataset=clusters", "dataset=stdlib"]
AFTER = (20, 1000)  # updates
DRAWS = 1000


def main() -> None:
    single_thread()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MOE_LAB_CACHE", cache)
        for data in DATA:
            trained, done = loop(*MODEL, data), 0
            for after in AFTER:
                for step in range(done, after):
                    trained.step(step)
                done = after
                report(f"{data.removeprefix('dataset=')}, after {after} updates", trained, after)


def report(title: str, trained: Loop, step: int) -> None:
    """One block: a row per baseline."""
    parts, s = trained.parts, trained.parts.settings
    raw = parts.data.train_batch(s.seed, s.steps, s.batch_size, s.seq_len)
    batch, values = examples(parts, raw.ids, raw.domain, torch.Generator()), parts.schedules.at(step - 1, s.steps)
    exact_ED, expected_T = expectation(trained, batch, values)
    found, explained = samples(trained, batch, values, expected_T)
    print(f"\n{title}: loss {float(expected_T.mean()):.2f}, {len(expected_T)} tokens, {DRAWS} draws, "
          f"norm of the exact gradient {float(exact_ED.norm()):.4f}; "
          f"the critic explains {explained:.0%} of the variance of the tokens' losses")  # fmt: skip
    print(f"  {'baseline':<27} {'variance':>10} {'of none':>8} {'sd/norm':>8} {'bias':>8} {'its s.e.':>8}")
    first = float(found["none"].var(0).sum())
    for name, g_NED in found.items():
        variance, bias = float(g_NED.var(0).sum()), float((g_NED.mean(0) - exact_ED).norm())
        error = (variance / len(g_NED)) ** 0.5
        noise = variance**0.5 / float(exact_ED.norm())
        print(
            f"  {name:<27} {variance:10.3e} {variance / first:8.4f} {noise:8.2f} {bias:8.4f} {error:8.4f}", flush=True
        )


def router_of(trained: Loop) -> Reinforce:
    router = trained.parts.model.moes[0].router
    assert isinstance(router, Reinforce)
    return router


@torch.no_grad()
def each_choice(trained: Loop, batch: Examples, values: Values) -> tuple[Tensor, Tensor]:
    """The loss of each token with each expert [T, E], and the router's logits [T, E]."""
    E = trained.parts.model.moes[0].experts.num
    quiet = draw(trained.parts, batch.inputs.numel(), 0, training=False)
    losses, logits_TE = [], torch.empty(0)
    for e in range(E):
        (ctx,) = contexts(trained.parts, values, batch, quiet)
        forced_E = torch.zeros(E).index_fill(0, torch.tensor(e), 1e6)
        out, loss_T = forward(trained.parts, batch, [replace(ctx, bias_E=forced_E)])
        losses.append(loss_T)
        logits_TE = out.routings[0].logits_TE
    return torch.stack(losses, -1), logits_TE


def expectation(trained: Loop, batch: Examples, values: Values) -> tuple[Tensor, Tensor]:
    """The gradient of the expected loss at the router's rows [E, D], and each token's expected loss [T]."""
    loss_TE, logits_TE = each_choice(trained, batch, values)
    p_TE = logits_TE.softmax(-1)
    expected_T = (p_TE * loss_TE).sum(-1)
    slope_TE = p_TE * (loss_TE - expected_T[:, None]) / len(expected_T)
    return slope_TE.T @ tokens(trained, batch, values), expected_T


@torch.no_grad()
def tokens(trained: Loop, batch: Examples, values: Values) -> Tensor:
    """What the router reads, [T, D]."""
    quiet = draw(trained.parts, batch.inputs.numel(), 0, training=False)
    return forward(trained.parts, batch, contexts(trained.parts, values, batch, quiet))[0].inputs[0]


def samples(trained: Loop, batch: Examples, values: Values, expected_T: Tensor) -> tuple[dict[str, Tensor], float]:
    """By baseline the policy gradient of every draw [N, E, D], and the critic's R^2 for the tokens' expected losses."""
    router, parts = router_of(trained), trained.parts
    T, E = len(expected_T), router.num_experts
    found: dict[str, list[Tensor]] = {}
    guess_T = torch.empty(0)
    for n in range(DRAWS):
        noise_TE = seeding.noise("gumbel", (T, E), "benchmark", n)
        out, loss_T = forward(parts, batch, contexts(parts, values, batch, [Drawn(noise_TE, {}, [], {})]))
        extra, guess_T = out.routings[0].extra, out.routings[0].extra["baseline_T"].detach()
        mean = router.running_2[0] / router.running_2[1]
        baselines = {"none": 0.0, "mean": mean, "critic": guess_T, "each token's expected loss": expected_T}
        for name, baseline in baselines.items():
            policy = ((loss_T.detach() - baseline) * extra["log_prob_T"]).mean()
            (g_ED,) = torch.autograd.grad(policy, router.weight_ED, retain_graph=True)
            found.setdefault(name, []).append(g_ED)
    explained = 1 - float((expected_T - guess_T).square().mean() / expected_T.var(unbiased=False))
    return {name: torch.stack(rows) for name, rows in found.items()}, explained


if __name__ == "__main__":
    main()
