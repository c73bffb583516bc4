"""Local files as a source: finding them and hashing them."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A file, the domain that it belongs to, and its name for messages and the hash."""

    path: Path
    domain: str
    name: str


def walk(root: Path, keep: Callable[[str], bool]) -> list[str]:
    """Files under `root` as sorted relative paths with "/"; `keep` sees each folder's and file's bare name.

    Only regular files: a pipe or a device would be waited for, or never end. OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if keep(name)]
        base = Path(folder).relative_to(root)
        found += [(base / name).as_posix() for name in names if keep(name) and (Path(folder) / name).is_file()]
    return sorted(found)


def content_hash(sources: Iterable[Source]) -> str:
    """sha256 over domains, names and contents."""
    total = hashlib.sha256()
    for source in sources:
        with open(source.path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        total.update(f"{source.domain}\0{source.name}\0".encode() + content)
    return total.hexdigest()
