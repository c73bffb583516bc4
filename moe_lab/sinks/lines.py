"""What the terminal says in lines: one per log step where there is no live screen, and the last words of a run."""

from pathlib import Path
from typing import Any

from rich.text import Text

from moe_lab.secrecy import hide
from moe_lab.sinks.board import STYLES, State, clean, clock, count, evaluation, number, weighs_all


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
        soft = weighs_all(row)
        cv, metric = ("weight cv", "gate_mass_cv") if soft else ("cv", "load_cv")
        parts += [
            f"worst {cv} {number(row.get(f'moe/{metric}/worst'), 2)}",
            f"entropy {number(row.get('moe/token_entropy/mean'), 2)}",
        ]
        parts += [] if soft else [f"dead {sum(n or 0 for n in row.get('moe/dead_experts') or []):.0f}"]
    return "  ".join(parts)


def verdict_line(step: int, layer: int, old: str | None, new: str, why: str) -> str:
    """A change of a layer's verdict."""
    change = f"{old} -> {new}" if old else new
    return clean(f"layer {layer}: {change} at step {step}" + (f" ({why})" if why else ""))


def start_lines(run_dir: str, facts: dict[str, Any]) -> list[str]:
    """Where this run's data goes, and what of its config has nothing to do."""
    lines = [*facts.get("destinations", []), f"run directory: {run_dir}", *facts.get("idle", [])]
    if facts.get("resumed_from") is not None:
        lines.append(f"resumed from step {facts['resumed_from']}")
    return [clean(hide(line)) for line in lines if line]


def closing(status: str, summary: dict[str, Any], state: State) -> Text:
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
    if summary.get("leaks"):
        text.append("later tokens had a say in routing: these losses compare with no causal model's\n", "bold yellow")
    if state.evaluation:
        text.append_text(evaluation(state.evaluation)).append("\n")
    text.append_text(verdicts(summary.get("verdicts") or []))
    return text.append_text(places(status, state.run_dir, state.facts.get("destinations", [])))


def verdicts(found: list[dict[str, Any]]) -> Text:
    """Healthy layers share a line; the others say since when and why, and what to try."""
    text = Text()
    for name in dict.fromkeys(v["verdict"] for v in found):
        layers = [v for v in found if v["verdict"] == name]
        style = STYLES.get(name, "")
        if name is None or name == "healthy":
            text.append(f"layer{'s' if len(layers) > 1 else ''} {ranges([v['layer'] for v in layers])}: ").append(
                name or "too early to say", style
            )
            text.append("\n")
            continue
        for v in layers:
            text.append(f"layer {v['layer']}: ").append(clean(name), style)
            text.append(f" since step {v['since']}" if v.get("since") is not None else "")
            text.append((f": {clean(v['why'])}" if v.get("why") else "") + "\n")
        for remedy in dict.fromkeys(r for v in layers for r in v.get("remedies") or []):
            text.append("   try ", "bold").append(clean(remedy) + "\n")
    return text


def ranges(numbers: list[int]) -> str:
    """[0, 4, 5, 6] -> "0, 4-6"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def places(status: str, run_dir: str, destinations: list[str]) -> Text:
    """Paths and commands to go on with."""
    text = Text()
    run_dir = clean(run_dir)
    for label, name in (("metrics", "metrics.jsonl"), ("summary", "summary.json"), ("checkpoints", "checkpoints")):
        if (Path(run_dir) / name).exists():
            text.append(f"{label}: ", "dim").append(f"{run_dir}/{name}\n")
    for line in filter(None, destinations):
        text.append(clean(hide(line)) + "\n")
    if status == "preempted":
        text.append("continue: ", "bold").append(f"moe-lab train resume={run_dir}\n")
    return text
