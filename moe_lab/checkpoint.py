"""Checkpoints: safetensors and JSON in one folder per step, checksummed by a manifest and renamed into place.

checkpoints/step-00000500/{model,optimizer,state}.safetensors, state.json, manifest.json. Nothing in them is code.
"""

import hashlib
import logging
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from moe_lab import durable, reading

log = logging.getLogger(__name__)
TENSORS = ("model", "optimizer", "state")
FILES = {"state.json", *(f"{name}.safetensors" for name in TENSORS)}


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of the model, the optimiser and everything else that has state, and plain values."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Tensor]
    values: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint under `folder` and delete the oldest beyond `keep`."""
    files = {f"{name}.safetensors": save(getattr(checkpoint, name)) for name in TENSORS}
    files["state.json"] = durable.encoded(checkpoint.values)
    sums = {name: {"sha256": hashlib.sha256(b).hexdigest(), "bytes": len(b)} for name, b in files.items()}
    files["manifest.json"] = durable.encoded({"step": checkpoint.step, "files": sums})
    final = folder / f"step-{checkpoint.step:08d}"
    for later in _steps(folder, checkpoint.step):  # damaged, or the run would not have gone back before them
        durable.remove(later)
    temporary = durable.hidden(final)
    try:
        if not folder.exists():
            folder.mkdir()
            durable.sync_folder(folder.parent)
        temporary.mkdir()
        for name, content in files.items():
            durable.fill(temporary / name, content)
        durable.sync_folder(temporary)
        temporary.rename(final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the space
        raise
    durable.sync_folder(folder)
    prune(folder, checkpoint.step, keep)
    return final


def prune(folder: Path, step: int, keep: int) -> None:
    """Of the checkpoints up to `step` keep the newest `keep`."""
    for old in _steps(folder, 0, step + 1)[:-keep]:
        durable.remove(old)


def newest(folder: Path, take: Callable[[Checkpoint], str | None] = lambda found: None) -> Checkpoint | None:
    """The newest checkpoint that is whole and that `take` accepts; None where there is none at all.

    take: says why a checkpoint will not do, or None. Others are skipped with a line. ValueError where none will do.
    """
    problems = []
    for path in reversed(_steps(folder)):
        problem = damage(path)
        if problem is None:
            try:
                found = load_checkpoint(path)
            except (SafetensorError, ValueError, OSError) as error:  # whole, and yet no checkpoint; or gone just now
                problem = " ".join(str(error).split())
            else:
                problem = take(found)
                if problem is None:
                    return found
        log.warning("checkpoint %s is damaged (%s); trying the one before", path.name, problem)
        problems.append(problem)
    if problems:
        raise ValueError(f"{folder}: every checkpoint is damaged (the newest: {problems[0]})")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    tensors = {name: load_file(path / f"{name}.safetensors") for name in TENSORS}
    step = reading.json_file(path / "manifest.json")["step"]
    return Checkpoint(step, **tensors, values=reading.json_file(path / "state.json"))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = reading.json_file(path / "manifest.json")
        if set(manifest["files"]) != FILES or manifest["step"] != _step(path):
            return "manifest.json is not that of this checkpoint"
        for name, expected in manifest["files"].items():
            if not (path / name).is_file() or (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has not the size that it was written with"
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def unsound(saved: Checkpoint) -> str | None:
    """The first tensor of model and optimiser that holds a number which is not finite, or None."""
    for kind in ("model", "optimizer"):
        for name, tensor in getattr(saved, kind).items():
            if not torch.isfinite(tensor).all():
                return f"{kind}.safetensors: {name} is not finite"
    return None


def _steps(folder: Path, first: int = 0, end: float = math.inf) -> list[Path]:
    """The checkpoints of the steps from `first` to before `end`, in order."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir())
    return sorted(path for path in found if first <= _step(path) < end)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
