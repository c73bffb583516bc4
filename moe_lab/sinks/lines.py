"""What the terminal says in lines: one per log step where there is no live screen, and the last words of a run."""

from pathlib import Path
from typing import Any

from rich.text import Text

from moe_lab.sinks.board import STYLES, clean, clock, count, evaluation, number


def step_line(row: dict[str, Any], timing: dict[str, Any], steps: int) -> str:
    """One log step in plain ASCII, greppable."""
    parts = [
        f"step {row.get('step')}/{steps}",
        f"loss {number(row.get('loss'), 4)}",
        f"ppl {number(row.get('ppl'), 2)}",
        f"{count(timing.get('tokens_per_s'))} tok/s",
        f"eta {clock(timing.get('eta'))}",
    ]
    if row.get("moe/load_cv"):
        dead = sum(n or 0 for n in row.get("moe/dead_experts") or [])
        parts += [
            f"worst cv {number(row.get('moe/load_cv/worst'), 2)}",
            f"entropy {number(row.get('moe/token_entropy/mean'), 2)}",
            f"dead {dead:.0f}",
        ]
    return "  ".join(parts)


def verdict_line(step: int, layer: int, old: str | None, new: str, why: str) -> str:
    """A change of a layer's verdict."""
    change = f"{old} -> {new}" if old else new
    return clean(f"layer {layer}: {change} at step {step}" + (f" ({why})" if why else ""))


def start_lines(run_dir: str, facts: dict[str, Any]) -> list[str]:
    """Where this run's data goes."""
    lines = [f"run directory: {run_dir}", *facts.get("destinations", [])]
    if facts.get("resumed_from") is not None:
        lines.append(f"resumed from step {facts['resumed_from']}")
    return [clean(line) for line in lines if line]


def closing(status: str, summary: dict[str, Any], run_dir: str, destinations: list[str]) -> Text:
    """The answer: how it ended, whether it learned, the verdict on each layer, and where everything is."""
    good = status == "completed"
    text = Text("\n")
    text.append(status, "bold green" if good else "bold yellow" if status == "preempted" else "bold red")
    text.append(f" after {summary.get('steps', 0)} steps, {count(summary.get('tokens'))} tokens")
    text.append(f", {clock(summary.get('wall_s'))}\n")
    if summary.get("error"):
        text.append(clean(str(summary["error"])) + "\n", "red")
    if summary.get("loss") is not None:
        text.append(f"train at {summary.get('steps')}  loss ")
        text.append(f"{number(summary['loss'], 3)}  ppl {number(summary.get('ppl'), 2)}\n")
    if summary.get("eval"):
        text.append_text(evaluation({"step": summary.get("steps"), **summary["eval"]})).append("\n")
    text.append_text(verdicts(summary.get("verdicts") or []))
    text.append_text(places(status, run_dir, destinations))
    text.no_wrap, text.overflow = False, "fold"
    return text


def verdicts(found: list[dict[str, Any]]) -> Text:
    """Layers with the same verdict and nothing to add share a line; the others say why and what to try."""
    text = Text()
    for verdict in dict.fromkeys(v["verdict"] for v in found):
        layers = [v for v in found if v["verdict"] == verdict]
        ids = ", ".join(str(v["layer"]) for v in layers)
        text.append(f"layer{'s' if len(layers) > 1 else ''} {ids}: ")
        text.append(clean(str(verdict or "too early to say")), STYLES.get(verdict, ""))
        text.append("\n")
        for v in layers if verdict != "healthy" else []:
            since = f" since step {v['since']}" if v.get("since") is not None else ""
            if v.get("why") or since:
                text.append(clean(f"  layer {v['layer']}{since}: {v.get('why', '')}") + "\n")
        for remedy in dict.fromkeys(r for v in layers for r in v.get("remedies") or []):
            text.append("  try: ", "bold").append(clean(remedy) + "\n")
    return text


def places(status: str, run_dir: str, destinations: list[str]) -> Text:
    """Paths and commands to go on with."""
    text = Text()
    run_dir = clean(run_dir)
    for label, name in (("metrics", "metrics.jsonl"), ("summary", "summary.json"), ("checkpoints", "checkpoints")):
        if (Path(run_dir) / name).exists():
            text.append(f"{label}: ", "dim").append(f"{run_dir}/{name}\n")
    for line in filter(None, destinations):
        text.append(clean(line) + "\n")
    if status == "preempted":
        text.append("continue: ", "bold").append(f"moe-lab train resume={run_dir}\n")
    return text
