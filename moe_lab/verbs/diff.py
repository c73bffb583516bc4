"""`moe-lab diff RUN RUN ...`: how runs differ in config and surroundings, and how they ended."""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_lab.cli import arguments, complain, printable, quiet_pipe
from moe_lab.reading import FOREIGN, Damaged
from moe_lab.recorded import Recorded, flat, read

SURROUNDINGS = ("moe_lab", "python", "versions.", "platform", "cuda", "threads", "sources", "git.", "device", "dtype")
DATA = "dataset.fingerprint"  # it differs wherever any other fact of the data does
HASH = re.compile("[0-9a-f]{32,}")


def main(argv: list[str]) -> int:
    parser = arguments("diff", "How runs differ in config, and in outcome.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="two run directories or more")
    parser.add_argument("--all", action="store_true", help="keys that do not differ as well")
    asked = parser.parse_args(argv)
    if len(asked.runs) < 2:
        return complain(["diff needs two runs: moe-lab diff RUN RUN"])
    quiet_pipe()
    try:
        _print([read(folder) for folder in asked.runs], asked.all)
    except ValueError as error:
        return complain([str(error)], 4 if isinstance(error, Damaged) else 2)
    except FOREIGN as error:
        return complain([f"one of these is not what a run writes ({type(error).__name__}); see moe-lab verify"], 4)
    return 0


def config_rows(runs: list[Recorded]) -> dict[str, list[Any]]:
    """Every config key of any run, with its value in each."""
    return _rows([flat(run.config) for run in runs])


def surroundings_rows(runs: list[Recorded]) -> dict[str, list[Any]]:
    """Versions, machine, code and data of each run."""
    told = [{k: v for k, v in flat(run.env).items() if k.startswith(SURROUNDINGS) or k == DATA} for run in runs]
    return _rows(told)


OUTCOME: dict[str, Callable[[Recorded], Any]] = {
    "status": lambda run: run.status.get("status"),
    "steps": lambda run: run.summary.get("steps", run.status.get("step")),
    "tokens": lambda run: run.summary.get("tokens"),
    "loss (train)": lambda run: run.summary.get("loss"),
    "loss (eval)": lambda run: run.summary.get("eval", {}).get("loss"),
    "ppl (eval)": lambda run: run.summary.get("eval", {}).get("ppl"),
    "loss (eval, hard top-k)": lambda run: run.summary.get("eval", {}).get("loss_topk"),
    "loss (bigram of the data)": lambda run: run.summary.get("eval", {}).get("bigram"),
    "load CV, worst layer": lambda run: run.summary.get("final", {}).get("moe/load_cv/worst"),
    "dead experts, worst layer": lambda run: run.summary.get("final", {}).get("moe/dead_experts/worst"),
    "leaks the future": lambda run: run.summary.get("leaks"),
    "verdicts": lambda run: _verdicts(run.summary.get("verdicts", [])),
    "parameters": lambda run: run.summary.get("cost", {}).get("params"),
    "active parameters": lambda run: run.summary.get("cost", {}).get("active_params"),
    "FLOPs per token": lambda run: run.summary.get("cost", {}).get("flops_per_token"),
    "useful FLOPs per token": lambda run: run.summary.get("cost", {}).get("useful_flops_per_token"),
    "experts per token (planned)": lambda run: run.summary.get("cost", {}).get("experts_executed"),
    "experts per token (measured)": lambda run: run.summary.get("cost", {}).get("experts_executed_measured"),
    "tokens/s (median)": lambda run: _median([t["tokens_per_s"] for t in run.timing if t.get("tokens_per_s")]),
    "seconds": lambda run: run.summary.get("wall_s"),
}


def _verdicts(verdicts: list[dict[str, Any]]) -> str | None:
    """`healthy` where all layers agree, else each with its layers: `healthy 0 1, collapsed 2`."""
    layers: dict[str, list[str]] = {}
    for verdict in verdicts:
        layers.setdefault(verdict["verdict"] or "too early", []).append(str(verdict["layer"]))
    if len(layers) < 2:
        return next(iter(layers), None)
    return ", ".join(f"{name} in layer {' '.join(which)}" for name, which in layers.items())


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _rows(columns: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, "-") for column in columns] for name in names}


def _print(runs: list[Recorded], everything: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, header_style="bold", show_edge=False, pad_edge=False)
    table.add_column("")
    for name in _names([run.folder for run in runs]):
        table.add_column(Text(printable(name)), overflow="fold")
    if len(runs) == 2:
        table.add_column("change", justify="right")
    outcome = {name: ["-" if (told := of(run)) is None else told for run in runs] for name, of in OUTCOME.items()}
    parts = {"config": config_rows(runs), "surroundings": surroundings_rows(runs), "outcome": outcome}
    for title, rows in parts.items():
        keep_all = everything or title == "outcome"
        shown = {name: v for name, v in rows.items() if keep_all or any(x != v[0] for x in v)}
        table.add_row(Text(title if shown else f"{title}: no difference", "dim italic"))
        for name, values in shown.items():
            cells = [Text(printable(_shown(value))) for value in values]
            table.add_row(Text(printable(f"  {name}")), *cells, *([_change(*values)] if len(runs) == 2 else []))
        table.add_section()
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def _names(folders: list[Path]) -> list[str]:
    """The shortest path ends that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _shown(value: Any) -> str:
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:12]
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _change(a: Any, b: Any) -> str:
    """b - a, with the per cent of a."""
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b)) or a == b:
        return ""
    change = f"{b - a:+.4g}" if abs(b - a) < 1000 else f"{b - a:+,.0f}"
    return change + (f" ({(b - a) / abs(a):+.1%})" if a else "")
