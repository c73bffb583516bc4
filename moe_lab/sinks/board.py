"""The live screen of a run as a pure function of what is known: dashboard(State) -> renderable. L layers, E experts."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
DEAD = "·"
STYLES = {
    "healthy": "green",
    "undecided": "yellow",
    "unlearned": "cyan",
    "balanced but unspecialised": "cyan",
    "oscillating": "magenta",
    "collapsed": "bold red",
    "frozen": "bold red",
}


@dataclass
class State:
    """What the screen shows: the facts of the run, its last rows, and each layer's verdict with its step."""

    run_dir: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)  # the last row that had one
    losses: list[float] = field(default_factory=list)
    changed: dict[int, int] = field(default_factory=dict)  # layer -> step at which its verdict last changed
    news: list[tuple[str, str]] = field(default_factory=list)  # (new verdict, line)

    def take(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        """Bring the state up to date with a row."""
        self.row, self.timing = row, timing
        if row.get("loss") is not None:
            self.losses.append(row["loss"])
        if "eval/loss" in row:
            self.evaluation = row


class Loads:
    """Loads `[E]` as one character each: balanced is a block of half height, twice that a full one, none a dot.

    Where there is less room than experts, neighbours share a character that shows their mean.
    """

    def __init__(self, loads_E: list[float]):
        self.loads_E = loads_E

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(8, len(self.loads_E)), min(64, len(self.loads_E)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield bars(self.loads_E, options.max_width)


def bars(loads_E: list[float], width: int) -> Text:
    """At most `width` characters for the loads `[E]`, in any unit; 0 is red, over twice the mean is yellow."""
    mean = sum(loads_E) / len(loads_E) or 1.0
    per = -(-len(loads_E) // width)
    text = Text(no_wrap=True)
    for i in range(0, len(loads_E), per):
        group = loads_E[i : i + per]
        ratio = sum(group) / len(group) / mean
        if ratio == 0:
            text.append(DEAD, "red")
        else:
            level = min(max(round(4 * ratio), 1), 8)
            text.append(BARS[level - 1], "red" if ratio < 0.25 else "yellow" if ratio > 2 else "green")
    return text


def dashboard(state: State, width: int = 110, height: int | None = None) -> Group:
    """The whole screen for a terminal of `width` columns; of the layers that do not fit into `height` lines
    the healthy and balanced ones are left out."""
    parts: list[Any] = [_header(state, width), _progress(state, roomy=width >= 80)]
    if state.evaluation:
        parts.append(evaluation(state.evaluation))
    if state.row.get("moe/selected"):
        parts.append(_layers(state, max(3, height - 10) if height else None, roomy=width >= 80))
    parts += [Text(line, STYLES.get(name, ""), no_wrap=True, overflow="ellipsis") for name, line in state.news[-3:]]
    return Group(*parts)


def _header(state: State, width: int) -> Text:
    text = Text.assemble(("moe-lab ", "bold"), (headline(state.facts), "cyan"), no_wrap=True, overflow="ellipsis")
    if len(text) + len(state.run_dir) + 2 <= width:
        text.append(f"  {clean(state.run_dir)}", "dim")
    return text


def headline(facts: dict[str, Any]) -> str:
    """Router, dataset and size in one line."""
    router, dataset = clean(str(facts.get("router"))), clean(str(facts.get("dataset")))
    size = f"{facts['layers']} MoE layers of {facts['experts']} experts" if facts.get("layers") else "no MoE layers"
    k, most = facts.get("k", 0), facts.get("k_at_most", 0)
    chosen = f", {f'up to {most}' if most > k else k} per token" if facts.get("layers") and k else ""
    leak = ", leaks the future" if facts.get("leaks") else ""
    return f"{router} on {dataset}, {size}{chosen}{leak}"


def _progress(state: State, roomy: bool) -> Table:
    step, steps = state.row.get("step", 0), state.facts.get("steps") or 1
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    if roomy:
        grid.add_column(ratio=1, min_width=8)
    grid.add_column(no_wrap=True, justify="right")
    values = Text.assemble(("loss ", "dim"), (number(state.row.get("loss"), 3), "bold"), " ")
    values.append(trend(state.losses[-16:]) + "  " if roomy else " ", "cyan")
    values.append("ppl ", "dim").append(number(state.row.get("ppl"), 2))
    speed = Text(f"{count(state.timing.get('tokens_per_s'))} tok/s  ETA {clock(state.timing.get('eta'))}")
    bar = [ProgressBar(total=steps, completed=step)] if roomy else []
    grid.add_row(Text(f"step {step}/{steps}"), values, *bar, speed)
    return grid


def trend(values: list[float]) -> str:
    """The last values as bars between their own extremes."""
    values = [v for v in values if math.isfinite(v)]
    low, span = min(values, default=0.0), max(values, default=0.0) - min(values, default=0.0)
    return "".join(BARS[round(7 * (v - low) / span) if span else 0] for v in values)


def evaluation(row: dict[str, Any]) -> Text:
    """The last evaluation beside the data's own lines, and the gap to hard top-1 inference."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("eval", "dim").append(f" at {row.get('step')}  ")
    text.append("loss ", "dim")
    text.append(number(row.get("eval/loss"), 3), "bold")
    text.append("  ppl ", "dim")
    text.append(number(row.get("eval/ppl"), 2))
    bigram, loss = row.get("eval/bigram"), row.get("eval/loss")
    if bigram is not None and loss is not None:
        below = loss < bigram
        text.append("  below" if below else "  above", "bold green" if below else "yellow")
        text.append(f" the bigram line {number(bigram, 3)}")
    if row.get("eval/unigram") is not None:
        text.append(f", unigram {number(row['eval/unigram'], 3)}")
    if row.get("eval/loss_top1") is not None and loss is not None:
        text.append(f"  hard top-1 {row['eval/loss_top1'] - loss:+.3f}")
    return text


def _layers(state: State, room: int | None, roomy: bool) -> Table:
    row = state.row
    layers, soft = len(row["moe/selected"]), weighs_all(row)
    what, loads, cv = ("weight", "gate_mass", "gate_mass_cv") if soft else ("load", "selected", "load_cv")
    shown = list(range(layers))
    if room and layers > room:
        shown = sorted(sorted(shown, key=lambda layer: _interest(row, layer))[:room])
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.header_style, table.border_style, table.caption_style = "dim", "dim", "dim"
    # Only the columns that may wrap are squeezed on a narrow terminal, and these two know how to be short.
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column(f"{what} of each expert" if roomy else what)
    table.add_column(f"{what} CV" if roomy else "CV", justify="right", no_wrap=True)
    table.add_column("entropy", justify="right", no_wrap=True)
    table.add_column("dead", justify="right", no_wrap=True)
    table.add_column("verdict")
    for layer in shown:
        dead = at(row, "dead_experts", layer)
        table.add_row(
            str(layer),
            Loads(row[f"moe/{loads}"][layer]),
            cv_text(row, cv, layer, share=roomy and not soft),
            number(at(row, "token_entropy", layer), 2),
            Text(number(dead, 0), "red" if dead else ""),
            _verdict(state, layer, roomy),
        )
    if len(shown) < layers:
        table.caption = f"{layers - len(shown)} layers in better shape are not shown"
    return table


def _interest(row: dict[str, Any], layer: int) -> tuple[bool, float]:
    """Sorts unhealthy layers and high load CV first."""
    return at(row, "verdict", layer) in (None, "healthy"), -(at(row, "load_cv", layer) or 0.0)


def _verdict(state: State, layer: int, roomy: bool) -> Text:
    name = at(state.row, "verdict", layer)
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(clean(name) if name else "too early", STYLES.get(name, "") if name else "dim")
    if roomy and name and layer in state.changed:
        text.append(f" at {state.changed[layer]}", "dim")
    return text


def cv_text(row: dict[str, Any], cv: str, layer: int, share: bool) -> Text:
    """A CV and, of the load's, how much of the possible imbalance that is."""
    of_ceiling = at(row, "load_cv_of_ceiling", layer)
    text = Text(number(at(row, cv, layer), 2))
    return text.append(f" {100 * of_ceiling:3.0f}%", "dim") if share and of_ceiling is not None else text


def weighs_all(row: dict[str, Any]) -> bool:
    """Whether all experts shape every token's output: then weights say who is used, and counts of choices do not."""
    return bool(row.get("moe/dead_experts")) and all(n is None for n in row["moe/dead_experts"])


def at(row: dict[str, Any], metric: str, layer: int) -> Any:
    """Value of a per-layer metric, None where it is not there."""
    values = row.get(f"moe/{metric}")
    return values[layer] if values else None


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """1234567 -> 1.23M."""
    if value is None:
        return "-"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def clock(seconds: float | None) -> str:
    """75.2 -> 1:15."""
    if seconds is None:
        return "-"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def clean(text: str) -> str:
    """Text from outside without the characters that steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def short(path: Path) -> str:
    """The path as one would type it here."""
    relative = os.path.relpath(path)
    return clean(str(path) if relative.startswith("..") else relative)
