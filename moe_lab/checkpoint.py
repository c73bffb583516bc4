"""Checkpoints: safetensors and JSON in one folder per step, checksummed by a manifest and renamed into place.

checkpoints/step-00000500/{model,optimizer,state}.safetensors, state.json, manifest.json. Nothing in them is code.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    files["state.json"] = json.dumps(checkpoint.values, indent=1).encode()
    sums = {name: {"sha256": hashlib.sha256(b).hexdigest(), "bytes": len(b)} for name, b in files.items()}
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".{final.name}.tmp.{os.getpid()}"
    temporary.mkdir(parents=True)
    for name, content in files.items():
        durable.write(temporary / name, content)
    durable.write_json(temporary / "manifest.json", {"step": checkpoint.step, "files": sums})
    if final.exists():  # a resumed run reaches the same step again and would write the same bytes
        shutil.rmtree(final)
    temporary.rename(final)
    durable.sync_folder(folder)
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold; damaged ones are skipped with a line. None where there is none.

    ValueError where there are some and none is whole.
    """
    found = _steps(folder)
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            try:
                return load_checkpoint(path)
            except (SafetensorError, ValueError) as error:  # whole as it was written, and yet no checkpoint
                problem = " ".join(str(error).split())
        log.warning("checkpoint %s is damaged (%s); trying the one before", path.name, problem)
    if found:
        raise ValueError(f"{folder}: every checkpoint is damaged")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    tensors = {name: load_file(path / f"{name}.safetensors") for name in TENSORS}
    step = reading.json_file(path / "manifest.json")["step"]
    return Checkpoint(step, **tensors, values=reading.json_file(path / "state.json"))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = reading.json_file(path / "manifest.json")
        if set(manifest["files"]) != FILES or manifest["step"] != int(path.name.removeprefix("step-")):
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


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir())
