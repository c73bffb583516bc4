"""Tiny runs through the command line, looked at from all sides: what it said, its rows, whether it is whole."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.command import moe_lab

SMALL = [
    *("logger=[]", "dataset=clusters", "dataset.tokens=2000", "model.dim=16", "model.heads=2", "model.layers=2"),
    *("experts.num=4", "experts.width=16", "batch_size=2", "seq_len=8", "steps=3", "eval_every=3", "eval_tokens=64"),
]
# Undefined in every run: nothing came before, a few updates are no evidence, two sequences may be of one domain.
ALWAYS = {"load_flutter", "load_shift", "churn", "verdict", "nmi_domain", "nmi_domain_floor"}
ROUTERS = {
    "dense": ["router=dense"],
    "topk": ["router=topk"],
    "topk plain": ["router=topk", "router.renormalise=false"],
    "switch": ["router=switch"],
    "noisy_topk": ["router=noisy_topk"],
    "softmax_ste": ["router=softmax_ste"],
    "softmax_ste dense": ["router=softmax_ste", "router.backward=dense"],
    "gumbel_softmax": ["router=gumbel_softmax"],
    "gumbel_ste": ["router=gumbel_ste"],
    "gumbel_ste dense": ["router=gumbel_ste", "router.backward=dense"],
    "sigmoid_topk": ["router=sigmoid_topk"],
}
SOFT = ("dense", "gumbel_softmax", "softmax_ste dense", "gumbel_ste dense")  # run every expert on every token
CHOOSING = [name for name in ROUTERS if name not in SOFT]


@dataclass(frozen=True)
class Ran:
    folder: Path
    said: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    def undefined(self) -> set[str]:
        """Names of the values that are null in some row, without those that always are at first."""
        found = {name.removeprefix("eval/").removeprefix("moe/") for row in self.rows for name in nulls(row)}
        return {name.split("/")[0] for name in found} - ALWAYS

    def each(self, name: str) -> list[Any]:
        """A per-layer or per-expert value: the entries of all rows and layers."""
        return [layer for row in self.rows for layer in row[f"moe/{name}"]]


def run(*words: str, code: int = 0) -> Ran:
    """`moe-lab train` in the current folder, to the end, and `moe-lab verify` of what it left."""
    said = moe_lab("train", *SMALL, *words)
    assert said.code == code and "Traceback" not in said.err, said.err
    (folder,) = Path("outputs").glob("*/*")
    told = moe_lab("verify", str(folder))
    assert told.code == 0 and told.out.endswith("whole\n"), told.out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(map(math.isfinite, numbers(rows)))
    summary = json.loads((folder / "summary.json").read_text())
    if code == 0:
        assert summary["status"] == "completed" and rows[-1]["loss"] == summary["loss"]
    return Ran(folder, said.err, rows, summary)


def balances(router: str) -> str:
    """Every balance loss that a router can have."""
    some = ["switch", "importance", "entropy", "z_loss"]
    return f"balance=[{','.join(some + ['loss_free'] * (router in CHOOSING))}]"


def nulls(node: Any, name: str = "") -> Iterator[str]:
    if node is None:
        yield name
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from nulls(value, name or key)
    for value in node if isinstance(node, list) else ():
        yield from nulls(value, name)


def numbers(node: Any) -> Iterator[float]:
    if isinstance(node, int | float):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from numbers(value)
