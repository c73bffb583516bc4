"""Where a run may write: the directory that the user names (output_dir, hydra.run.dir, hydra.sweep.dir), and no other.

What is joined to that directory, or stands in it when a run goes on, must not lead out of it.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = re.compile(r"(?!\.\.?$)[\w.=,+-]{1,100}")
LOG = re.compile(r"\$\{hydra\.runtime\.output_dir\}/(\$\{hydra\.job\.name\}|[\w-]+)\.log")
# wandb leaves a link to its service's log in the cache; nobody opens it to write, and a run must go on beside it.
SERVICE_LOG = re.compile(r"wandb/(offline-)?run-[\w-]+/logs/debug-core\.log")
LONGEST = 255  # bytes of one part of a path, on every usual file system
LONGEST_PATH = 3800  # bytes; Linux takes 4,096, and what a run writes has names of its own


def joined(hydra: Mapping[str, Any]) -> Iterator[str]:
    """What Hydra would join to a run's directory (unresolved) and is no plain name."""
    names = {"output_subdir": hydra["output_subdir"], "job.name": hydra["job"]["name"]}
    for key, value in names.items():
        if value is not None and not NAME.fullmatch(str(value)):
            yield f"hydra.{key}={value}: must be a plain name; it is joined to the run's directory"
    for key in ("job_logging", "hydra_logging"):
        handlers = (hydra[key] or {}).get("handlers") or {}
        for name, handler in handlers.items():
            file = handler.get("filename") if isinstance(handler, Mapping) else None
            if file is not None and not LOG.fullmatch(str(file)):
                where = f"hydra.{key}.handlers.{name}.filename={file}"
                yield f"{where}: logs belong into the run's directory: ${{hydra.runtime.output_dir}}/NAME.log"


def directory(key: str, folder: str) -> list[str]:
    """What is wrong with a directory of the user's choice: its name, or a link in what it holds already."""
    leading_out = [] if (problems := named(key, folder)) else [leads_out(Path(folder))]
    return problems or [f"{key}={folder}: {problem}" for problem in leading_out if problem]


def named(key: str, folder: str) -> list[str]:
    """What is wrong with the name of a directory."""
    if not folder:
        return [f"{key}: is empty; name a directory"]
    if not all(c.isprintable() for c in folder):
        return [f"{key}={folder}: holds a control character or half a character"]
    if any(len(os.fsencode(part)) > LONGEST for part in Path(folder).parts):
        return [f"{key}={folder[:40]}...: a part of it is longer than {LONGEST} bytes"]
    if (length := len(os.fsencode(os.path.abspath(folder)))) > LONGEST_PATH:
        return [f"{key}={folder[:40]}...: is {length:,} bytes long, {LONGEST_PATH:,} at most"]
    return []


def below(key: str, name: str) -> list[str]:
    """What is wrong with a directory that must lie below another."""
    if problems := named(key, name):
        return problems
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
        return [f"{key}={name}: must stay below hydra.sweep.dir"]
    return []


def leads_out(folder: Path) -> str | None:
    """The first thing in a run's directory through which writing would leave it: a link out of it, a pipe, a device."""
    root = os.path.realpath(folder)
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in sorted((*folders, *names))):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a process that is ending takes its own away
                continue
            inside = Path(os.path.realpath(path)).is_relative_to(root) or _is_service_log(path, folder)
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (stat.S_ISLNK(mode) and inside)):
                kind = "a link that leads out of the run" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                return f"{path} is {kind}; a run writes only inside its own directory"
    return None


def _is_service_log(path: Path, folder: Path) -> bool:
    return SERVICE_LOG.fullmatch(path.relative_to(folder).as_posix()) is not None
