"""A run of the past for W&B: what its folder holds of the live mirror's record, and that record made anew.

What the mirror writes is made by the same functions of sinks/wandb.py, and written by the same sinks/upload.py.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lab import reading
from moe_lab.config import build
from moe_lab.recorded import Recorded
from moe_lab.secrecy import hide, redacted
from moe_lab.sinks import record, wandb
from moe_lab.sinks.account import entity
from moe_lab.sinks.base import one_line
from moe_lab.sinks.upload import Upload

RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
MOST_NUMBERS = 1 << 16  # of a row; a picture of so many experts would take the process down
Call = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Plan:
    """What is to be done for a run: files to upload, or, where there is a reason, a record to make first."""

    run: Recorded
    destination: str
    files: list[Path]
    why: str | None = None

    @property
    def uploaded(self) -> bool:
        """Whether wandb has marked every file as uploaded."""
        return bool(self.files) and all(path.with_suffix(".wandb.synced").exists() for path in self.files)


def plan(run: Recorded, rebuild: bool) -> Plan:
    """The newest files of the run's wandb folder that together hold each row once; else why there are none."""
    with reading.of_a_run(run.folder):
        mirror = mirror_of(run)
        place = (mirror.entity or entity(), mirror.project)
        known = known_id(run.folder)
    where = f"{place[0] or '(your entity)'}/{place[1]}"
    found = sorted(run.folder.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.parent.name.split("run-", 1)[1])
    if rebuild or not found:
        return Plan(run, where, [], "asked for" if rebuild else "it has no wandb folder")
    left, files = [row["step"] for row in run.rows], []
    for path in reversed(found):
        try:
            read = record.read(path)
        except ValueError as error:
            return Plan(run, where, [], str(error))
        if read.ids != {known} or read.places != {place}:
            return Plan(run, where, [], f"{path.name} is of another run or goes elsewhere")
        if not read.ended or left[len(left) - len(read.steps) :] != read.steps:
            return Plan(run, where, [], f"{path.name} does not hold the rows of metrics.jsonl")
        files, left = [path, *files], left[: len(left) - len(read.steps)]
        if not left:
            return Plan(run, where, files)
    return Plan(run, where, [], f"{len(left)} rows are not in its wandb folder")


def make(run: Recorded) -> Path:
    """Write the record that the live mirror would have written, offline; its file."""
    with reading.of_a_run(run.folder):
        todo = list(calls(run))
    upload = Upload(_loud)
    try:
        for name, values in todo:
            getattr(upload, name)(*values)
    except OSError:
        raise
    except Exception as error:  # wandb refuses what it is given
        with contextlib.suppress(Exception):
            upload.let_go()
        raise reading.Damaged(f"{run.folder}: W&B does not take it ({one_line(error)})") from None
    (path,) = Path(upload.run.dir).parent.glob("run-*.wandb")
    return path


def _loud(kind: str, text: str) -> None:
    """Offline there is nothing to tell."""


def calls(run: Recorded) -> Iterator[Call]:
    """The calls of Upload that the live mirror would have made. Whatever is wrong with the folder is found here."""
    cfg, env = redacted(run.config), run.env
    facts = env | {"params": env.get("cost"), "router": cfg["router"]["name"], "dataset": cfg["dataset"]["name"]}
    told = mirror_of(run).run_of(run.folder, cfg, facts)
    shown = {key: _without_secrets(told[key]) for key in ("group", "name", "tags", "config")}
    yield "open", ("offline", told | shown, wandb.settings())
    clocks = {row["step"]: row for row in run.timing}
    for row in run.rows:
        call = wandb.row_of(row, clocks.get(row["step"], {}))
        _must_be_numbers(call)
        yield "row", call
    values, tags, code = wandb.end_of(str(run.status.get("status")), run.summary)
    yield "close", (_without_secrets(values), _without_secrets(tags), code)


def mirror_of(run: Recorded) -> wandb.Wandb:
    """The live mirror as the run's config has it; with its defaults where the run had none."""
    return build("logger", {**(run.config.get("wandb") or {}), "name": "wandb"})


def known_id(folder: Path) -> str | None:
    """The run's id on W&B, where it has one already."""
    path = folder / "wandb_run_id.txt"
    text = reading.content(path, 1000).decode().strip() if path.exists() else ""
    if text and not RUN_ID.fullmatch(text):
        raise ValueError("wandb_run_id.txt holds no id")
    return text or None


def _must_be_numbers(call: tuple[int, dict[str, float], list[list[float]], dict[str, float]]) -> None:
    _, curves, loads_LE, lines = call
    numbers = [*curves.values(), *lines.values(), *(load for loads_E in loads_LE for load in loads_E)]
    if any(type(value) not in (int, float) for value in numbers) or len(numbers) > MOST_NUMBERS:
        raise ValueError("a metric is no number, or there are too many")


def _without_secrets(value: Any) -> Any:
    """The same value; a run directory may be older than what hides secrets, or edited."""
    if isinstance(value, dict):
        return {key: _without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    return hide(value) if isinstance(value, str) else value
