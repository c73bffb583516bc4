"""`moe-lab verify RUN`: is this run whole? Reads everything and touches nothing."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_lab import reading
from moe_lab.cli import arguments, complain, printable, quiet_pipe
from moe_lab.run import config_hash

STATUSES = ("created", "running", "completed", "diverged", "failed", "oom", "timeout", "preempted")
Check = Callable[[Path], str]  # says what it found, or raises Bad


class Bad(Exception):
    """A check failed; says what is wrong."""


def main(argv: list[str]) -> int:
    parser = arguments("verify", "Check that a run is whole, without touching it.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    folder = parser.parse_args(argv).run
    if not folder.is_dir():
        return complain([f"{folder}: no such directory"])
    if not (folder / "status.json").exists() and not (folder / "config.yaml").exists():
        return complain([f"{folder}: no run directory (it has neither config.yaml nor status.json)"])
    quiet_pipe()
    bad = 0
    for name, good, said in verify(folder):
        bad += not good
        print(f"{'ok ' if good else 'BAD'}  {name:<12} {printable(said)}")
    print(f"{printable(str(folder))}: {f'{bad} of the checks failed' if bad else 'whole'}")
    return 4 if bad else 0


def verify(folder: Path) -> Iterator[tuple[str, bool, str]]:
    """(check, whether it holds, what was found) for each check."""
    for name, check in CHECKS.items():
        try:
            yield name, True, check(folder)
        except Bad as bad:
            yield name, False, str(bad)
        except ValueError as error:
            yield name, False, str(error)
        except (OSError, LookupError, TypeError, AttributeError) as error:
            yield name, False, f"{type(error).__name__}: {error}"


def _files(folder: Path) -> str:
    wanted = ["config.yaml", "overrides.txt", "status.json", "metrics.jsonl", "timing.jsonl"]
    status = _status(folder)
    wanted += ["env.json"] if status not in ("created", None) else []
    wanted += ["summary.json"] if status == "completed" else []
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise Bad(f"missing: {', '.join(missing)}")
    return f"{len(wanted)} files are there"


def _state(folder: Path) -> str:
    status = _status(folder)
    if status not in STATUSES:
        raise Bad(f"{status!r} is no status of a run")
    return f"{status} at step {_json(folder / 'status.json')['step']}"


def _config(folder: Path) -> str:
    cfg = reading.yaml_file(folder / "config.yaml")
    if not (folder / "env.json").exists():
        return "readable; the run did not begin"
    recorded, found = _json(folder / "env.json")["config_hash"], config_hash(cfg)
    if recorded != found:
        raise Bad(f"config.yaml has the hash {found}, the run began with {recorded}: it was edited since")
    return f"is that of the run ({found})"


def _metrics(folder: Path) -> str:
    rows = _rows(folder / "metrics.jsonl")
    for before, after in pairwise(rows):
        if after["step"] <= before["step"]:
            raise Bad(f"step {after['step']} follows step {before['step']}")
        if after["tokens"] < before["tokens"]:
            raise Bad(f"tokens fall from {before['tokens']} to {after['tokens']} at step {after['step']}")
    for row in rows:
        wrong = [name for name in ("loss", "ppl", "loss_total", "lr", "grad_norm") if row.get(name, 0.0) is None]
        if wrong and row is not rows[-1]:
            raise Bad(f"{wrong[0]} of step {row['step']} is not a number, and yet the run went on")
    return f"{len(rows)} rows, steps in order" + (f" to {rows[-1]['step']}" if rows else "")


def _timing(folder: Path) -> str:
    steps = {row["step"] for row in _rows(folder / "metrics.jsonl")}
    rows = _rows(folder / "timing.jsonl")
    lost = steps - {row["step"] for row in rows}
    if lost:
        raise Bad(f"no clocks for step {min(lost)}")
    return f"{len(rows)} rows"


def _summary(folder: Path) -> str:
    if _status(folder) != "completed":
        return "not completed: none is needed"
    summary, rows = _json(folder / "summary.json"), _rows(folder / "metrics.jsonl")
    steps = reading.yaml_file(folder / "config.yaml")["steps"]
    if not rows or not summary["steps"] == rows[-1]["step"] == steps:
        raise Bad(f"says {summary['steps']} steps; the last row is {rows[-1]['step'] if rows else None} of {steps}")
    for name, value in [("loss", summary["loss"]), ("ppl", summary["ppl"]), *summary["final"].items()]:
        if value != rows[-1][name]:
            raise Bad(f"says {name} {value}, the last row {rows[-1][name]}")
    return f"agrees with the last row (loss {summary['loss']:.4f})"


def _checkpoints(folder: Path) -> str:
    found = sorted(path for path in (folder / "checkpoints").glob("step-*") if path.is_dir())
    if not found:
        return "none"
    from moe_lab.checkpoint import damage

    for path in found:
        if problem := damage(path):
            raise Bad(f"{path.name}: {problem}")
        state = _json(path / "state.json")
        begin = reading.sha256_of_start(folder / "metrics.jsonl", state["metrics_bytes"])
        if begin != state["metrics_sha256"]:
            raise Bad(f"metrics.jsonl is not what {path.name} was written with: a row was edited since")
    return f"{', '.join(path.name for path in found)}: checksums hold"


CHECKS: dict[str, Check] = {
    "files": _files,
    "status": _state,
    "config": _config,
    "metrics": _metrics,
    "timing": _timing,
    "summary": _summary,
    "checkpoints": _checkpoints,
}


def _status(folder: Path) -> Any:
    return _json(folder / "status.json").get("status")


def _json(path: Path) -> dict[str, Any]:
    return _finite(path.name, reading.json_file(path))


def _rows(path: Path) -> list[dict[str, Any]]:
    """Every line must be one JSON object and end in a newline."""
    rows = []
    for number, line in enumerate(reading.lines(path), 1):
        where = f"{path.name} line {number}"
        if not line.endswith(b"\n"):
            raise Bad(f"{path.name} ends in half a line")
        rows.append(_finite(where, reading.row(line, where)))
    return rows


def _finite(where: str, value: Any) -> Any:
    """JSON has no NaN and no Infinity, but Python's reader takes them."""
    if isinstance(value, float) and not math.isfinite(value):
        raise Bad(f"{where} holds a number that is not finite")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(where, inner)
    return value
