"""Rows of a made-up run in the format of metrics.jsonl and timing.jsonl, for tests of what reads them."""

from typing import Any

VERDICTS = ("healthy", "collapsed", "undecided", "balanced but unspecialised", "oscillating", "frozen")


def made_rows(
    layers: int = 2, experts: int = 4, steps: int = 6, eval_every: int = 3
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(metrics row, timing row) per step; every value differs by step, layer and expert, and is exact in binary."""
    return [_row(step, layers, experts, steps, eval_every) for step in range(1, steps + 1)]


def _row(step: int, layers: int, experts: int, steps: int, eval_every: int) -> tuple[dict[str, Any], dict[str, Any]]:
    loss = 4 + 1 / 2**step
    row: dict[str, Any] = {"step": step, "tokens": 1024 * step, "window": 1, "loss": loss, "ppl": 50 + loss}
    row |= {"loss_total": loss + 0.5, "lr": step / 1024, "grad_norm": 1.5, "term/switch": 0.5, "knob/temperature": 1.0}
    if layers:
        row["moe/selected"] = [[64 + step + 2 * e + layer for e in range(experts)] for layer in range(layers)]
        row["moe/nmi_domain"] = [None] * layers
        for i, metric in enumerate(
            ("load_cv", "max_vio", "load_cv_of_ceiling", "token_entropy", "mutual_information", "churn", "load_flutter")
        ):
            row[f"moe/{metric}"] = [(1 + i + layer + step) / 64 for layer in range(layers)]
            row[f"moe/{metric}/mean"] = row[f"moe/{metric}"][0] / 2
            row[f"moe/{metric}/worst"] = max(row[f"moe/{metric}"])
        row["moe/router_grad_ratio"] = [step / 8] * layers
        row["moe/dead_experts"] = [layer + step for layer in range(layers)]
        row["moe/coupling_gap"] = [step / 32 + layer for layer in range(layers)]
        row["moe/verdict"] = [None if step < 2 else VERDICTS[layer % len(VERDICTS)] for layer in range(layers)]
    if step % eval_every == 0:
        row |= {
            "eval/loss": loss + 0.25,
            "eval/ppl": 70.0,
            "eval/loss_top1": loss + 0.375,
            "eval/loss_topk": loss + 0.25,
        }
        row |= {"eval/unigram": 4.75, "eval/bigram": 4.5, "eval/tokens": 2048}
    return row, {"step": step, "time": 0.0, "elapsed": step / 2, "tokens_per_s": 41234.0, "eta": (steps - step) / 2}


def made_facts(layers: int = 2, experts: int = 4, steps: int = 6, **more: Any) -> dict[str, Any]:
    """What a run knows before its first step."""
    facts = {"layers": layers, "experts": experts, "k": 1, "steps": steps, "router": "topk", "dataset": "clusters"}
    return {**facts, "params": {"total": 1000}, "tags": [], "resumed_from": None, "git": None, **more}


def made_summary(layers: int = 2, status: str = "completed") -> dict[str, Any]:
    """A summary.json that goes with `made_rows`."""
    found = [
        {
            "layer": layer,
            "verdict": VERDICTS[layer % len(VERDICTS)],
            "since": 3 if layer else None,
            "why": f"because of {layer}" if layer else "",
            "remedies": ["more noise"] if layer else [],
        }
        for layer in range(layers)
    ]
    return {"status": status, "steps": 6, "tokens": 6144, "loss": 4.0, "ppl": 54.6, "verdicts": found, "wall_s": 61.0}
