"""`moe-lab train resume=RUN`: go on from a run's checkpoint, or from step 0 before its first, with its own config."""

import json
import logging.config
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from moe_lab import config, presets, reading
from moe_lab.cli import complain, printable
from moe_lab.recorded import flat
from moe_lab.run import lenient_rows, read_status

SAFE = ("checkpoint.every", "checkpoint.keep", "wandb.mode")  # change no number, so they may differ from the run's


def main(run: str, overrides: list[str]) -> int:
    folder = Path(run)
    recorded = [name for name in ("config.yaml", "env.json") if (folder / name).is_file()]
    begun = "env.json" in recorded or (folder / "checkpoints").exists()
    if not begun and (recorded or (folder / "status.json").is_file()):  # stopped while it prepared its data
        return complain([f"resume={run}: has no checkpoint to go on from; start the run again"], 4)
    if "config.yaml" not in recorded:
        return complain([f"resume={run}: no run directory (it has no config.yaml)"])
    try:
        cfg = reading.yaml_file(folder / "config.yaml")
        choices = dict(reading.json_file(folder / "env.json")["choices"])
    except (OSError, ValueError, KeyError, TypeError):
        return complain([f"resume={run}: config.yaml or env.json is damaged; see moe-lab verify {run}"], 4)
    try:
        changed, refused = _apply(overrides, cfg, choices)
    except OverrideParseException as error:
        return complain([f"{error.override}: not understood; write key=value"])
    except KeyError as error:
        return complain([str(error.args[0])])
    if refused:
        return complain([f"{line}; only {', '.join(SAFE)} may change when a run goes on" for line in refused], 4)
    if problems := config.check(changed):
        if overrides:
            return complain(problems)
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        return complain([f"resume={run}: config.yaml is not that of a run: {problems[0]}{more}"], 4)
    if _lost(folder, cfg):
        return complain([f"resume={run}: has no checkpoint to go on from; start the run again"], 4)
    return _go(folder, changed)


def _lost(folder: Path, cfg: Mapping[str, Any]) -> bool:
    """Whether there must have been checkpoints and is none. Before its first one a run starts again from step 0:
    also when it died while it wrote that one, whose row is there already."""
    if any((folder / "checkpoints").glob("step-*/manifest.json")):
        return False
    rows, status = lenient_rows(folder / "metrics.jsonl"), read_status(folder) or {}
    reached = max([status.get("step", 0), *(row["step"] for row in rows[-1:])])
    return reached > min(cfg["checkpoint"]["every"], cfg["steps"]) or status.get("status") == "completed"


def _apply(overrides: list[str], cfg: dict[str, Any], choices: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The config with the safe overrides in it, and a line for each other one that asks for something else."""
    changed, refused = json.loads(json.dumps(cfg)), []
    known = flat(cfg)
    for override in OverridesParser.create().parse_overrides(overrides):
        key, value = override.key_or_group, override.value()
        if key in choices:
            if str(value) != str(choices[key]):
                refused.append(f"{key}={value}: this run has {key}={choices[key]}")
        elif key not in known:
            raise KeyError(f"{key}: no such key in this run{config.nearest(key, known)}")
        elif key in SAFE:
            node = changed
            for part in key.split(".")[:-1]:
                node = node[part]
            node[key.split(".")[-1]] = value
        elif value != known[key]:
            refused.append(f"{key}={config.shown(value)}: this run has {key}={config.shown(known[key])}")
    return changed, refused


def _go(folder: Path, cfg: dict[str, Any]) -> int:
    from moe_lab.verbs.train import guarded

    told = reading.yaml_file(presets.conf_dir() / "hydra/job_logging/moe_lab.yaml")
    told["handlers"]["file"]["filename"] = str(folder / "train.log")
    logging.config.dictConfig(told)

    def go() -> dict[str, Any]:
        from moe_lab.train import resume

        return resume(folder, cfg)

    done = (read_status(folder) or {}).get("status") == "completed"
    summary = guarded(go, folder)
    if "exit" in summary:
        return complain([summary["message"]], summary["exit"])
    if done:
        print(printable(f"{folder}: was completed before; its summary is {folder / 'summary.json'}"))
    return 0
