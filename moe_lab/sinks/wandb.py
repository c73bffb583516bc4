"""The mirror on Weights & Biases: main curves at each row; a heatmap and histograms of the load at evaluations."""

import contextlib
import importlib.util
import os
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moe_lab import durable
from moe_lab.config import option
from moe_lab.sinks.account import has_key
from moe_lab.sinks.base import guarded
from moe_lab.sinks.board import short
from moe_lab.sinks.mirror import Mirror

# What W&B gets. Its limits (keys per project, points per chart) and a reader's patience set the number: with 12 layers
# of 64 experts, one curve per expert would be 768 charts. Everything else is in metrics.jsonl.
GLOBAL = ("loss", "ppl", "lr", "eval/loss", "eval/ppl", "moe/load_cv/worst", "moe/token_entropy/mean")
PER_LAYER = (
    "load_cv",
    "max_vio",
    "token_entropy",
    "dead_experts",
    "mutual_information",
    "nmi_domain",
    "router_grad_ratio",
    "coupling_gap",
    "load_flutter",
)
# Seconds to reach the server, and to upload what is left at the end. wandb uploads while it runs, so that is a few
# requests either way. Together with a start offline in between they fit into the mirror's deadline.
INIT_TIMEOUT = 6.0
FINISH_TIMEOUT = 6.0
OLD_NAMES = {"dryrun": "offline", "run": "online"}  # values of WANDB_MODE


@option("logger", "wandb")
class Wandb(Mirror):
    """A W&B run per run directory. wandb itself is only imported in the mirror's process, see sinks/upload.py."""

    player, title = "moe_lab.sinks.upload", "W&B"

    def __init__(
        self,
        *,
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        project: str = "moe-lab",
        entity: str | None = None,
        group: str | None = None,
        run_name: str | None = None,
        tags: Sequence[str] = [],
    ):
        super().__init__()
        self.mode, self.project, self.entity, self.group = mode, project, entity, group
        self.run_name, self.tags = run_name, list(tags)
        self.run_dir = Path()

    def describe(self) -> str:
        if self.note.startswith("offline") and not self.failed:
            return f"{super().describe()}; to upload later: {self._sync()}"
        return super().describe()

    def advice(self) -> str:
        return f"; to upload what W&B has: {self._sync()}" if any(self.run_dir.glob("wandb/*run-*")) else ""

    def _sync(self) -> str:
        """The command that uploads every attempt of this run; a shell expands the star."""
        kind = "offline-run" if self.note.startswith("offline") else "run"
        return f"wandb sync {shlex.quote(short(self.run_dir))}/wandb/{kind}-*"

    @guarded
    def open(self, run_dir: Path, cfg: dict[str, Any], facts: dict[str, Any]) -> None:
        self.run_dir, mode = run_dir, resolve_mode(self.mode)
        if mode == "disabled":
            self.note = "disabled"
            return
        if importlib.util.find_spec("wandb") is None:
            self.break_off("wandb is not installed here")
            return
        self.note = f"{mode}, project {self.project}" if mode == "online" else mode
        if mode == "online" and not has_key():
            self.note = "offline, since no key is configured (`wandb login`)"
            mode = "offline"
        self.start()
        self.send("open", mode, self.run_of(run_dir, cfg, facts), settings())

    def run_of(self, run_dir: Path, cfg: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        """The run as wandb.init is told of it."""
        told = {key: facts.get(key) for key in ("git", "params", "layers", "resumed_from")}
        return {
            "project": self.project,
            "entity": self.entity,
            "group": self.group or (cfg["sweep"]["name"] if (run_dir.parent / "sweep.json").exists() else None),
            "name": self.run_name or run_dir.name,
            "job_type": "train",
            "tags": run_tags(facts, cfg, self.tags),
            "config": {**cfg, "facts": told},
            "id": run_id(run_dir),
            "dir": str(run_dir),
        }

    @guarded
    def row(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        self.send("row", *row_of(row, timing))

    @guarded
    def close(self, status: str, summary: dict[str, Any]) -> None:
        self.end("close", *end_of(status, summary))


def resolve_mode(mode: str) -> Literal["online", "offline", "disabled"]:
    """`auto` becomes what WANDB_MODE says, else online where a key is configured, else offline."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "").lower() or ("online" if has_key() else "offline")
        mode = OLD_NAMES.get(mode, mode)
    if mode == "online" or mode == "disabled":
        return mode
    return "offline"


def run_tags(facts: dict[str, Any], cfg: dict[str, Any], own: Sequence[str]) -> list[str]:
    """Router, dataset, balancers, explorers and the user's tags, each once; W&B takes 1 to 64 characters."""
    lists = [name for group in ("balance", "explore") for name in cfg.get(group) or {}]
    tags = [facts.get("router"), facts.get("dataset"), *lists, *facts.get("tags", []), *own]
    return list(dict.fromkeys(str(tag)[:64] for tag in tags if tag))


def row_of(
    row: dict[str, Any], timing: dict[str, Any]
) -> tuple[int, dict[str, float], list[list[float]], dict[str, float]]:
    """What Upload.row is told of a row: its step, curves, loads `[L][E]` to draw, values for the run's summary."""
    clock = {"_timestamp": timing["time"]} if "time" in timing else {}
    loads_LE, lines = [], {}
    if "eval/loss" in row:
        loads_LE = row.get("eval/moe/selected") or row.get("moe/selected") or []
        lines = {k: row[k] for k in ("eval/unigram", "eval/bigram") if row.get(k) is not None}
    return row["step"], scalars(row) | clock, loads_LE, lines


def end_of(status: str, summary: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
    """What Upload.close is told of a run's end: values for its summary, tags, exit code."""
    verdicts = {f"verdict/L{v['layer']:02d}": v["verdict"] for v in summary.get("verdicts", [])}
    tags = [f"verdict:{name}"[:64] for name in sorted({str(v) for v in verdicts.values() if v})]
    told = {"status": status, "leaks": int(bool(summary.get("leaks"))), **verdicts}
    return told, tags, 0 if status in ("completed", "preempted") else 1


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """At most 10 values for the run and 9 per layer; undefined ones are left out."""
    values = {key: row.get(key) for key in ("tokens", *GLOBAL)}
    if row.get("eval/loss") is not None and row.get("eval/loss_top1") is not None:
        values["eval/gap_top1"] = row["eval/loss_top1"] - row["eval/loss"]
    if dead := [n for n in row.get("moe/dead_experts") or [] if n is not None]:
        values["moe/dead_experts/total"] = sum(dead)
    for metric in PER_LAYER:
        for layer, value in enumerate(row.get(f"moe/{metric}") or []):
            values[f"moe_layer/L{layer:02d}/{metric}"] = value
    return {key: value for key, value in values.items() if value is not None}


def settings() -> dict[str, Any]:
    """Nothing about the machine, the code or the command line leaves by way of W&B."""
    return {
        "console": "off",
        "disable_git": True,
        "save_code": False,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "init_timeout": INIT_TIMEOUT,
        "finish_timeout": FINISH_TIMEOUT,
        "finish_timeout_raises": True,
    }


def run_id(run_dir: Path) -> str:
    """The id of this run directory on W&B, the same after a resume."""
    path = run_dir / "wandb_run_id.txt"
    with contextlib.suppress(FileNotFoundError):
        if known := path.read_text().strip():
            return known
    durable.write(path, secrets.token_hex(6).encode())
    return path.read_text()
