"""The pictures and numbers of docs/dashboards.md, from real runs: `make docs` trains what is missing and draws them.

python docs/dashboards.py RUN... writes docs/dashboard-NAME.svg for each run directory NAME, with the curves that W&B
gets of it, and the table of docs/dashboards.md.
"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from moe_lab.recorded import Recorded, read
from moe_lab.sinks.heatmap import colours
from moe_lab.sinks.wandb import scalars

HERE = Path(__file__).parent
# Metric of a layer -> highest value shown; the same axes for all runs, so that they compare.
CURVES = {
    "load_cv": 2.65,  # sqrt(8 - 1), the ceiling at 8 experts
    "dead_experts": 8,
    "load_flutter": 1,
    "token_entropy": 1.02,
    "mutual_information": 1,
    "nmi_domain": 0.3,
}


def draw(run: Recorded) -> None:
    """The load of each expert of the last layer over time, and the curves of every layer."""
    # The reader's own letters: a picture fetches nothing, and stays small.
    plt.rcParams |= {
        "svg.fonttype": "none",
        "font.sans-serif": ["DejaVu Sans"],
        "svg.hashsalt": "moe-lab",
        "font.size": 8,
    }
    figure, axes = plt.subplots(1, 1 + len(CURVES), figsize=(12, 1.9), layout="constrained")
    loads = [row["moe/selected"][-1] for row in run.rows]
    image = colours(loads).transpose(1, 0, 2)  # expert by row of the log
    edges = [0, *(row["tokens"] / 1000 for row in run.rows)]
    axes[0].pcolormesh(edges, np.arange(len(loads[0]) + 1) - 0.5, image, rasterized=True)
    axes[0].set_title(f"load, layer {len(run.rows[0]['moe/selected']) - 1}")
    axes[0].set_ylabel("expert")
    for axis, (metric, top) in zip(axes[1:], CURVES.items(), strict=True):
        for layer in range(len(run.rows[0]["moe/selected"])):
            values = curve(run, f"moe_layer/L{layer:02d}/{metric}")
            axis.plot([x for x, _ in values], [y for _, y in values], label=f"L{layer:02d}", linewidth=1)
        axis.set_title(metric)
        axis.set_ylim(0, top)
        axis.set_xlim(0, edges[-1])
    axes[1].legend(frameon=False, handlelength=1)
    figure.supxlabel("thousand tokens", fontsize=8)
    # Without a date in it, the same runs give the same file.
    figure.savefig(HERE / f"dashboard-{run.folder.name}.svg", metadata={"Date": None})


def curve(run: Recorded, key: str) -> list[tuple[float, float]]:
    """(thousand tokens, value) of a curve as W&B gets it."""
    sent = [scalars(row) for row in run.rows]
    return [(row["tokens"] / 1000, row[key]) for row in sent if key in row]


def table(runs: list[Recorded]) -> str:
    """Means over the last fifth of each run's rows, of the first and the last layer, and the run's own last words."""
    names = ["run", "verdicts", *(f"`{metric}`" for metric in CURVES), "`eval/loss`"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for run in runs:
        verdicts = [f"{v['verdict']} since {v['since']}" for v in run.summary["verdicts"]]
        cells = [", ".join(tail(run, layer, metric) for layer in range(len(verdicts))) for metric in CURVES]
        verdict = "; ".join(dict.fromkeys(verdicts))
        lines.append(f"| {run.folder.name} | {verdict} | {' | '.join(cells)} | {run.summary['eval']['loss']:.3f} |")
    return "\n".join(lines)


def tail(run: Recorded, layer: int, metric: str) -> str:
    values = [y for _, y in curve(run, f"moe_layer/L{layer:02d}/{metric}")]
    return f"{np.mean(values[-max(1, len(values) // 5) :]):.3g}"


def main(folders: list[Path]) -> None:
    runs = [read(folder) for folder in folders]
    for run in runs:
        draw(run)
    page = HERE / "dashboards.md"
    begin, end = "<!-- numbers: written by docs/dashboards.py -->\n", "\n<!-- end of numbers -->"
    text = re.sub(f"{begin}.*?{end}", lambda _: begin + table(runs) + end, page.read_text(), flags=re.DOTALL)
    page.write_text(text)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
