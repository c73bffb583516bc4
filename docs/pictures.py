"""The README's pictures, from real runs: `make docs` trains what is missing and draws them.

python docs/pictures.py DEMO COLLAPSED BALANCED writes docs/terminal.svg (the live screen at the end of DEMO) and
docs/collapse.svg (load over training without and with balancing).
"""

import json
import re
import sys
from io import StringIO
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from rich.console import Console

from moe_lab import load
from moe_lab.loading import LoadedRun
from moe_lab.sinks.board import State, dashboard
from moe_lab.sinks.lines import closing

HERE = Path(__file__).parent


def terminal(run: LoadedRun) -> None:
    """The live screen as it stood after the run's last row."""
    env = json.loads((run.folder / "env.json").read_text())
    facts = env | {"router": run.config["router"]["name"], "dataset": run.config["dataset"]["name"]}
    state = State(run_dir=str(run.folder), facts=facts)
    timings = [json.loads(line) for line in (run.folder / "timing.jsonl").read_text().splitlines()]
    before: list[str | None] = []
    for row, timing in zip(run.metrics, timings, strict=True):
        state.take(row, timing)
        now = row["moe/verdict"]
        state.changed |= {i: row["step"] for i, v in enumerate(now) if before and v != before[i]}
        before = now
    console = Console(record=True, width=110, file=StringIO(), force_terminal=True)
    console.print(dashboard(state, width=110))
    console.print(closing("completed", json.loads((run.folder / "summary.json").read_text()), state))
    svg = console.export_svg(title="moe-lab train router=gumbel_ste")
    # The reader's own monospace font: a picture fetches nothing.
    (HERE / "terminal.svg").write_text(re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL))


def collapse(runs: dict[str, LoadedRun]) -> None:
    """Share of the tokens that each expert gets, layer by layer, over training."""
    layers = len(runs[next(iter(runs))].metrics[0]["moe/selected"])
    figure, axes = plt.subplots(layers, len(runs), figsize=(9, 2.2 * layers), sharex=True, sharey=True, squeeze=False)
    for column, (title, run) in enumerate(runs.items()):
        steps = [row["step"] for row in run.metrics]
        for layer in range(layers):
            counts = [row["moe/selected"][layer] for row in run.metrics]
            shares = [[n / sum(row) for n in row] for row in counts]
            axis = axes[layer][column]
            axis.stackplot(steps, *zip(*shares, strict=True), colors=plt.get_cmap("tab10").colors, linewidth=0)
            axis.set_ylabel(f"layer {layer}" if column == 0 else "")
            axis.set_xscale("log")
            axis.margins(0)
        axes[0][column].set_title(title, fontsize=10)
        axes[-1][column].set_xlabel("update")
    figure.suptitle("share of the tokens that each of the experts gets", fontsize=10)
    figure.tight_layout()
    # Without a date in it, the same runs give the same file.
    figure.savefig(HERE / "collapse.svg", metadata={"Date": None})


if __name__ == "__main__":
    demo, bare, balanced = (load(path) for path in sys.argv[1:])
    terminal(demo)
    collapse(
        {f"router={r.config['router']['name']} balance=[{','.join(r.config['balance'])}]": r for r in (bare, balanced)}
    )
