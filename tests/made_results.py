"""Results of made-up studies, for tests of what reads them: runs as `recorded.read` would give them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.recorded import Recorded
from moe_lab.study.files import Claim, Study
from moe_lab.study.folder import Job, Sweep
from moe_lab.study.judge import Verdict
from moe_lab.study.results import Result, Results
from moe_lab.study.statistics import Estimate

ARMS = ("even", "skewed", "drifting", "noisy")


def made_run(
    arm: int = 0,
    seed: int = 0,
    layers: int = 2,
    experts: int = 4,
    domains: int = 3,
    rows: int = 12,
    folder: str = "run",
) -> Recorded:
    """A run whose imbalance grows with `arm`; expert 0 of the last layer gets most."""
    rng = np.random.default_rng((arm, seed))
    bias_E = arm * np.linspace(1, -1, experts)
    steps = np.unique(np.geomspace(1, 400, rows).round().astype(int)).tolist()
    found = [_row(step, steps, layers, domains, bias_E, rng) for step in steps]
    names = {f"domain {c}": 1000 for c in range(domains)}
    cost = {"params": 5000, "active_params": 2000 + arm, "flops_per_token": 4000}
    env = {"k": 1, "layers": layers, "experts": experts, "cost": cost, "dataset": {"train_tokens_per_domain": names}}
    status = {"status": "completed", "step": 400, "error": None, "attempt": 1, "pid": 1}
    return Recorded(Path(folder), {"seed": seed}, env, status, {}, found, [])


def _row(step: int, steps: list[int], layers: int, domains: int, bias_E: np.ndarray, rng: Any) -> dict[str, Any]:
    part = step / steps[-1]
    loads_LE = [np.exp(part * (layer + 1) * bias_E + 0.1 * rng.normal(size=len(bias_E))) for layer in range(layers)]
    counts_LE = [np.round(4096 * load_E / load_E.sum()).astype(int).tolist() for load_E in loads_LE]
    cv = [float(np.std(c) / np.mean(c) / max(len(c) - 1, 1) ** 0.5) for c in counts_LE]
    loss = 2 + 2 / step**0.3 + 0.1 * float(bias_E[0]) + 0.02 * float(rng.normal())
    row = {"step": step, "tokens": 4096 * step, "window": 1, "loss": loss, "moe/selected": counts_LE}
    row |= {
        "moe/load_cv_of_ceiling/worst": max(cv),
        "moe/token_entropy/mean": 1 - part / 2,
        "moe/dead_experts/worst": 0,
    }
    row["moe/load_cv_of_ceiling"] = cv
    row["moe/verdict"] = ["healthy" if c < 0.33 else "collapsed" for c in cv]
    if step in steps[len(steps) // 2 :: 3] or step == steps[-1]:
        row |= _evaluation(loss, counts_LE, max(cv), domains, rng)
    return row


def _evaluation(loss: float, counts_LE: list[list[int]], cv: float, domains: int, rng: Any) -> dict[str, Any]:
    L, E = len(counts_LE), len(counts_LE[0])
    rows_LED = rng.normal(size=(L, E, 8))
    rows_LED /= np.linalg.norm(rows_LED, axis=-1, keepdims=True)
    joint_LEC = rng.multinomial(100, [1 / domains] * domains, size=(L, E))
    return {
        "eval/loss": loss + 0.05,
        "eval/loss_top1": loss + 0.06,
        "eval/moe/selected": counts_LE,
        "eval/moe/load_cv_of_ceiling/worst": cv,
        "eval/moe/max_vio/worst": 2 * cv,
        "eval/moe/token_entropy/mean": 0.8,
        "eval/moe/nmi_domain/mean": 0.2,
        "eval/moe/nmi_domain_floor/mean": 0.05,
        "eval/moe/nmi_position/worst": 0.01,
        "eval/moe/churn/worst": 0.3 * float(rng.random()),
        "eval/moe/router_cos/mean": 0.1,
        "eval/moe/expert_loss": (loss + 0.1 * rng.normal(size=(L, E))).tolist(),
        "eval/moe/router_cos_matrix": np.round(rows_LED @ rows_LED.transpose(0, 2, 1), 4).tolist(),
        "eval/moe/domain_counts": joint_LEC.tolist(),
    }


def made_results(
    arms: tuple[str, ...] = ARMS, seeds: int = 3, study: Study | None = None, name: str = "made", **sizes: int
) -> Results:
    """All runs completed, but for a last seed of the first arm that diverged."""
    results = []
    for i, arm in enumerate(arms):
        for seed in range(seeds):
            job = Job(arm, seed, ["router=switch", f"seed={seed}"], f"{i}-{seed}")
            results.append(Result(job, made_run(i, seed, folder=job.dir, **sizes), "completed", None, None, "0" * 64))
    job = Job(arms[0], seeds, ["router=switch", f"seed={seeds}"], f"0-{seeds}")
    results.append(Result(job, None, "diverged", "diverged: the loss of update 7 is not finite", None, None))
    sweep = Sweep(Path("outputs/sweeps/made"), name, "cpu", study, [r.job for r in results], "moe-lab sweep made")
    return Results(sweep, results, [f"1 of {len(results)} runs diverged: {arms[0]} seed {seeds}"])


def made_study(text: Callable[[str], str] = str) -> Study:
    """Three claims; `text` changes what is free text in it."""
    ours = text("ours")
    compared: dict[str, Any] = {"source": ours, "metric": "eval/loss"}
    claims = [
        Claim(says=text("skewed is skewed"), source=ours, metric="moe/load_cv_of_ceiling", arm="skewed", at_least=0.1),
        Claim(says=text("even is cheaper"), compare=["even", "skewed"], at_most=0.0, **compared),
        Claim(says=text("they cost the same"), compare=["even", "noisy"], by="ratio", within=0.01, **compared),
    ]
    arms: dict[str, list[str]] = {arm: [f"router={arm}"] for arm in ARMS}
    return Study(
        question=text("Is it even?"), source=text("arXiv 0000.00000"), arms=arms, scales={"cpu": []}, claims=claims,
        unequal={"active_params": text("skewed has one more")},
    )  # fmt: skip


def made_verdicts(study: Study, text: Callable[[str], str] = str) -> list[Verdict]:
    """One of each kind; the last without an estimate, and of claims that were edited."""
    one, two, three = study.claims
    return [
        Verdict(one, "supported", _estimate(0.31, 0.25, 0.37), {0: 0.3, 1: 0.31, 2: 0.32}, 0.01, "", False),
        Verdict(two, "refuted", _estimate(0.2, 0.1, 0.3), {0: 0.2, 1: 0.1, 2: 0.3}, None, text("by far"), False),
        Verdict(three, "inconclusive", None, {}, None, text("needs seeds"), True),
    ]


def _estimate(mean: float, low: float, high: float) -> Estimate:
    return Estimate(mean, low, high, 0.9833, 0.004, 3, low + 0.01, high - 0.01, 0.25, 0.25, 7)


def write_run(folder: Path, run: Recorded) -> None:
    """A run's directory, as far as a report reads it."""
    folder.mkdir(parents=True)
    config = {"seed": run.config["seed"], "router": {"name": "switch"}, "steps": 400}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "overrides.txt").write_text(f"router=switch\nseed={config['seed']}\n")
    (folder / "env.json").write_text(json.dumps(run.env))
    (folder / "status.json").write_text(json.dumps(run.status))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in run.rows))
