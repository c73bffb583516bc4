"""Writing so that a reader sees the old content or the new, never half of either, even after kill -9."""

import json
import os
import shutil
from pathlib import Path
from typing import Any


def write(path: Path, content: bytes) -> None:
    """Replace `path` atomically: a temporary file in the same folder, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write` of indented JSON; NaN and infinity are refused (they are no JSON)."""
    write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def sweep(folder: Path) -> None:
    """Remove what a killed writer left behind. Only for who holds the folder's lock."""
    for left in folder.rglob(".*.tmp.*"):
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
