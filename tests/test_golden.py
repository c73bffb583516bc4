"""Thirty steps on the synthetic clusters against a curve that was recorded once: refactors must not move it.

`python tests/test_golden.py` records it anew; do that only for a change that is meant to move the numbers, and say so.
"""

import json
import tempfile
from pathlib import Path

import pytest
from tiny import tiny

from moe_lab import load
from moe_lab.train import train

GOLDEN = Path(__file__).parent / "goldens" / "clusters.json"
RUNS = {
    "gumbel_ste": ["router=gumbel_ste"],
    "topk": ["router=topk", "balance=[importance]"],
    "loss_free": ["router=sigmoid_topk", "balance=[loss_free]", "schedule=anneal"],
    "mlm": ["objective=mlm", "router=switch"],
}
KEYS = ("loss", "loss_total", "grad_norm", "lr")


def curve(name: str, folder: Path) -> dict[str, list[float]]:
    train(tiny(*RUNS[name], "steps=30", "eval_every=30"), folder, [], {})
    rows = load(folder).metrics
    return {key: [row[key] for row in rows] for key in KEYS} | {"eval/loss": [rows[-1]["eval/loss"]]}


@pytest.mark.parametrize("name", RUNS)
def test_thirty_steps(name: str, tmp_path: Path) -> None:
    # Other CPUs add in other orders; a real change moves these numbers in the second or third digit.
    for key, values in curve(name, tmp_path).items():
        assert values == pytest.approx(json.loads(GOLDEN.read_text())[name][key], rel=2e-3), key


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {name: curve(name, Path(folder) / name) for name in RUNS}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
