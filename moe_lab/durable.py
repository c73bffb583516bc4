"""Writing so that a reader sees the old content or the new, never half of either, even after kill -9."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write(path: Path, content: bytes) -> None:
    """Replace `path` atomically: a temporary file in the same folder, fsync, rename, fsync of the folder."""
    temporary = hidden(path)
    try:
        fill(temporary, content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)


def fill(path: Path, content: bytes) -> None:
    """Write a file that nobody looks for yet, and fsync it."""
    with naming(path), path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def write_json(path: Path, value: Any) -> None:
    """`write` of indented JSON; NaN and infinity are refused (they are no JSON)."""
    write(path, encoded(value))


def encoded(value: Any) -> bytes:
    """A file of indented JSON."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def hidden(path: Path) -> Path:
    """The name beside `path` of what is not there yet, or not any more; `sweep` removes it."""
    return path.with_name(f".{path.name}.tmp.{os.getpid()}")


def remove(folder: Path) -> None:
    """Remove a folder so that it is never seen half."""
    gone = hidden(folder)
    folder.rename(gone)
    shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left behind. Only for who holds the folder's lock."""
    for left in folder.rglob(".*.tmp.*"):
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """What works on an open file fails without saying which: say it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
