"""What a run wrote down, read back without torch: for diff and export."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lab import reading
from moe_lab.reading import Damaged


@dataclass(frozen=True)
class Recorded:
    folder: Path
    config: dict[str, Any]
    env: dict[str, Any]
    status: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    timing: list[dict[str, Any]]


def read(folder: Path) -> Recorded:
    """A run directory; parts that a run has not written yet are empty. ValueError where it is none or is damaged."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: no run directory (it has no config.yaml)")
    try:
        config = reading.yaml_file(folder / "config.yaml")
        env, status, summary = (_json(folder / name) for name in ("env.json", "status.json", "summary.json"))
        rows, timing = reading.rows(folder / "metrics.jsonl"), reading.rows(folder / "timing.jsonl")
    except ValueError as error:
        raise Damaged(f"{folder}: damaged ({_first_line(error)}); see moe-lab verify {folder}") from None
    return Recorded(folder, config, env, status, summary, rows, timing)


def flat(node: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        where = f"{path}.{key}" if path else str(key)
        found |= flat(value, where) if isinstance(value, Mapping) and value else {where: value}
    return found


def _json(path: Path) -> dict[str, Any]:
    return reading.json_file(path) if path.exists() else {}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
