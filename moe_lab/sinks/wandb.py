"""The mirror on Weights & Biases: main curves at each row; a heatmap and histograms of the load at evaluations."""

import contextlib
import functools
import logging
import os
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moe_lab.config import option
from moe_lab.sinks.account import has_key
from moe_lab.sinks.base import Sink, guarded, one_line
from moe_lab.sinks.board import short

log = logging.getLogger(__name__)

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
)
INIT_TIMEOUT = 15.0  # seconds; a dead server costs a run this much once, then it is offline
FINISH_TIMEOUT = 60.0  # seconds to upload what is left; `wandb sync` sends the rest
OLD_NAMES = {"dryrun": "offline", "run": "online"}  # values of WANDB_MODE


@option("logger", "wandb")
class Wandb(Sink):
    """A W&B run per run directory. Whatever goes wrong with W&B is said once and never stops the training."""

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
        self.mode, self.project, self.entity, self.group = mode, project, entity, group
        self.run_name, self.tags = run_name, list(tags)
        self.run: Any = None
        self.note = ""

    def describe(self) -> str:
        return f"W&B: {self.note}" if self.note else ""

    @guarded
    def open(self, run_dir: Path, cfg: dict[str, Any], facts: dict[str, Any]) -> None:
        mode = resolve_mode(self.mode)
        if mode == "disabled":
            self.note = "disabled"
            return
        try:
            import wandb  # noqa: F401
        except Exception as error:  # also a broken installation
            self.failed = True
            self.note = f"not usable here ({type(error).__name__}), the metrics are in the run directory"
            return
        if mode == "online" and not has_key():
            self.note = "offline, since no key is configured (`wandb login`)"
            mode = "offline"
        start = functools.partial(self._init, run_dir, cfg, facts)
        run_id, sync = _run_id(run_dir), "wandb sync"
        if mode == "online":
            try:
                self.run = start(mode, run_id)
                self.note = f"online at {self.run.url}"
                return
            except Exception as error:
                log.warning("W&B did not answer as it should, recording offline: %s", one_line(error))
                self.note, sync = "offline, since going online failed", f"wandb sync --id {run_id}"
                run_id = _new_id()  # wandb holds on to the id of a failed attempt as long as the process lives
        self.note = self.note or "offline"
        try:
            self.run = start("offline", run_id)
        except Exception:
            self.note = "off, it could not start; the metrics are in the run directory"
            raise
        self.note += f"; to upload later: {sync} {shlex.quote(short(Path(self.run.dir).parent))}"

    def _init(
        self, run_dir: Path, cfg: dict[str, Any], facts: dict[str, Any], mode: Literal["online", "offline"], run_id: str
    ) -> Any:
        import wandb

        # wandb's own telemetry connects to the server even when offline; the service process reads this as it starts.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb.setup(wandb.Settings(silent=True))  # it would tear the live screen; `describe` says what there is to say
        run = wandb.init(
            mode=mode,
            project=self.project,
            entity=self.entity,
            group=self.group or (cfg.get("study") if run_dir.parent.parent.name == "sweeps" else None),
            name=self.run_name or run_dir.name,
            job_type="train",
            tags=run_tags(facts, cfg, self.tags),
            config={**cfg, "facts": {key: facts.get(key) for key in ("git", "params", "layers", "resumed_from")}},
            id=run_id,
            resume="allow",
            reinit="create_new",  # several runs in one process stay apart
            dir=str(run_dir),
            settings=wandb.Settings(**_settings(wandb, mode)),
        )
        run.define_metric("tokens", hidden=True)
        run.define_metric("*", step_metric="tokens")
        run.define_metric("eval/loss", step_metric="tokens", summary="min,last")
        return run

    @guarded
    def row(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        if self.run is None:
            return
        values: dict[str, Any] = scalars(row)
        if "eval/loss" in row:
            values |= pictures(row)
            self.run.summary.update({k: row[k] for k in ("eval/unigram", "eval/bigram") if row.get(k) is not None})
        self.run.log(values, step=row["step"])

    @guarded
    def close(self, status: str, summary: dict[str, Any]) -> None:
        if self.run is None:
            return
        run, self.run = self.run, None
        try:
            if not self.failed:
                verdicts = {f"L{v['layer']:02d}": v["verdict"] for v in summary.get("verdicts", [])}
                run.summary.update({"status": status, **{f"verdict/{k}": v for k, v in verdicts.items()}})
                names = sorted({str(v) for v in verdicts.values() if v})
                run.tags = (*(run.tags or ()), *(f"verdict:{name}"[:64] for name in names))
        finally:
            run.finish(exit_code=0 if status in ("completed", "preempted") else 1)


def resolve_mode(mode: str) -> Literal["online", "offline", "disabled"]:
    """`auto` becomes what WANDB_MODE says, else online where a key is configured, else offline."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "").lower() or ("online" if has_key() else "offline")
        mode = OLD_NAMES.get(mode, mode)
    if mode == "online" or mode == "disabled":
        return mode
    return "offline"


def run_tags(facts: dict[str, Any], cfg: dict[str, Any], own: Sequence[str]) -> list[str]:
    """Router, dataset, balancers and the user's tags, each once; W&B takes 1 to 64 characters."""
    tags = [facts.get("router"), facts.get("dataset"), *(cfg.get("balance") or {}), *facts.get("tags", []), *own]
    return list(dict.fromkeys(str(tag)[:64] for tag in tags if tag))


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """At most 10 values for the run and 8 per layer; undefined ones are left out."""
    values = {key: row.get(key) for key in ("tokens", *GLOBAL)}
    if row.get("eval/loss") is not None and row.get("eval/loss_top1") is not None:
        values["eval/gap_top1"] = row["eval/loss_top1"] - row["eval/loss"]
    if dead := row.get("moe/dead_experts"):
        values["moe/dead_experts/total"] = sum(n for n in dead if n is not None)
    for metric in PER_LAYER:
        for layer, value in enumerate(row.get(f"moe/{metric}") or []):
            values[f"moe_layer/L{layer:02d}/{metric}"] = value
    return {key: value for key, value in values.items() if value is not None}


def pictures(row: dict[str, Any]) -> dict[str, Any]:
    """A heatmap of the whole model and a histogram per layer of the experts' loads (1: balanced)."""
    loads_LE = row.get("eval/moe/selected") or row.get("moe/selected")
    if not loads_LE:
        return {}
    import numpy as np
    import wandb

    from moe_lab.sinks.heatmap import CAPTION, heatmap

    values: dict[str, Any] = {"moe/load_heatmap": wandb.Image(heatmap(loads_LE), caption=CAPTION)}
    for layer, loads_E in enumerate(np.asarray(loads_LE, dtype=np.float64)):
        relative_E = loads_E / max(loads_E.mean(), 1e-12)
        values[f"moe_layer/L{layer:02d}/load"] = wandb.Histogram(
            np_histogram=np.histogram(relative_E, bins=min(64, 2 * len(loads_E)), range=(0.0, len(loads_E)))
        )
    return values


def _settings(wandb: Any, mode: str) -> dict[str, Any]:
    """Nothing about the machine, the code or the command line leaves by way of W&B, and it prints nothing."""
    wanted = {
        "console": "off",  # else it wraps stdout and stores each redraw
        "disable_git": True,
        "save_code": False,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_disable_stats": mode == "offline",
        "x_save_requirements": False,
        "init_timeout": INIT_TIMEOUT,
        "finish_timeout": FINISH_TIMEOUT,
    }
    return {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}  # x_ names come and go


def _new_id() -> str:
    return secrets.token_hex(6)


def _run_id(run_dir: Path) -> str:
    """The id of this run directory on W&B, the same after a resume."""
    path = run_dir / "wandb_run_id.txt"
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(_new_id())
    return path.read_text().strip()
