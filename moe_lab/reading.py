"""Reading JSON and YAML that anybody may have written: plain values, or ValueError in one line.

A run directory may come from somebody else. What is read from it is data of a known kind: never code, never a
pipe or a device that has no end, never so deep or so large that reading it takes the process down.
"""

import contextlib
import hashlib
import json
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

LARGEST_JSON = 64 << 20
LONGEST_LINE = 16 << 20
DEEPEST = 50
CHUNK = 1 << 20
MOST_VALUES = 10_000
LARGEST_YAML = 256 << 10  # a config has a few kilobytes, and yaml is slow to read

# What code raises that takes a file of somebody else's for a run's.
FOREIGN = (LookupError, TypeError, AttributeError, ArithmeticError)


class Damaged(ValueError):
    """What stands in a run directory is not what a run writes."""


@contextlib.contextmanager
def of_a_run(folder: Path) -> Iterator[None]:
    """Around code that takes what it reads for what a run wrote: Damaged in one line where it is something else."""
    try:
        yield
    except Damaged:
        raise
    except (ValueError, RuntimeError, *FOREIGN) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Damaged(f"{folder}: holds what no run writes ({said}); see moe-lab verify {folder}") from error


def json_file(path: Path) -> dict[str, Any]:
    """A JSON object. FileNotFoundError where there is none."""
    return json_object(content(path, LARGEST_JSON), path.name)


def json_object(text: bytes, name: str) -> dict[str, Any]:
    """A JSON object from its bytes; NaN and infinity are no JSON."""
    try:
        value = _JSON.decode(text.decode())
    except RecursionError:
        raise ValueError(f"{name}: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: a JSON object is needed, this is {type(value).__name__}")
    return _shallow(value, name)


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file, each with its step; a torn last line is left out, and so is a file that is not there."""
    if not path.exists():
        return []
    whole = (line for line in lines(path) if line.endswith(b"\n"))
    return [row(line, f"{path.name} line {number}") for number, line in enumerate(whole, 1)]


def row(line: bytes, where: str) -> dict[str, Any]:
    """One line of a jsonl file."""
    found = json_object(line, where)
    if type(found.get("step")) is not int:
        raise ValueError(f"{where}: has no step")
    return found


def yaml_file(path: Path) -> dict[str, Any]:
    """A YAML mapping of plain values. FileNotFoundError where there is none."""
    text = content(path, LARGEST_YAML)
    try:
        value = _Plain(text).get_single_data()
    except RecursionError:
        raise ValueError(f"{path.name}: nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        said = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{path.name}: {' '.join(said.split())}") from None
    if not isinstance(value, dict) or not _plain(value):
        raise ValueError(f"{path.name}: a mapping of plain values is needed")
    return _shallow(value, path.name)


def lines(path: Path) -> Iterator[bytes]:
    """A regular file's lines, each with its newline. A file of a gigabyte may take no disk, and be one line."""
    must_be_regular(path)
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path.name}: a line is longer than {LONGEST_LINE:,} bytes")
            yield line


def sha256_of_start(path: Path, size: int) -> str:
    """Of the first `size` bytes of a regular file, or of all where it is shorter."""
    must_be_regular(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (part := file.read(min(size, CHUNK))):
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()


def must_be_regular(path: Path) -> None:
    """ValueError for a pipe, which would be waited for, and a device, which may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path.name}: is no regular file")


def too_much(paths: Iterable[Path]) -> list[str]:
    """A line for each yaml file that would take down whoever reads it: a pipe, megabytes, or a few bytes that stand
    for millions of values. What else may be wrong with it is told when it is used."""
    found = []
    for path in paths:
        try:
            if not path.is_dir():
                _weigh(content(path, LARGEST_YAML), path.name)
        except ValueError as error:
            found.append(f"{path.parent}/{error}")
        except (OSError, yaml.YAMLError):
            continue
    return found


def _weigh(text: bytes, name: str) -> None:
    """ValueError where a yaml text nests too deep or, with its aliases written out, holds too many values."""
    sizes: dict[str | None, int] = {}  # of what has an anchor
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor and values so far, from the outside in
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
        elif isinstance(event, yaml.ScalarEvent | yaml.AliasEvent | yaml.CollectionEndEvent):
            alias = isinstance(event, yaml.AliasEvent)
            anchor, size = (None, sizes.get(event.anchor, 1)) if alias else (getattr(event, "anchor", None), 1)
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, size = open_nodes.pop()
            sizes[anchor] = size
            outer, total = open_nodes.pop()
            open_nodes.append((outer, total + size))
            if total + size > MOST_VALUES:
                raise ValueError(f"{name}: holds more than {MOST_VALUES:,} values, its aliases written out")
        if len(open_nodes) > DEEPEST:
            raise ValueError(f"{name}: nested too deep")


def content(path: Path, most: int | None = None) -> bytes:
    """A regular file's bytes."""
    must_be_regular(path)
    size = path.stat().st_size
    if most is not None and size > most:
        raise ValueError(f"{path.name}: {size:,} bytes, {most:,} at most")
    return path.read_bytes()


def _shallow(value: dict[str, Any], name: str) -> dict[str, Any]:
    """The same value, if whoever walks through it will come back: Python's stack is finite."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = [v for node in level for v in (node.values() if isinstance(node, dict) else node)]
        level = [node for node in inner if isinstance(node, dict | list)]
        if not level:
            return value
    raise ValueError(f"{name}: nested too deep")


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_no_json)


class _Plain(yaml.SafeLoader):
    """An alias makes a few bytes into gigabytes; a config that was written by a run has none."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases are not read")
        return super().compose_node(parent, index)


def _plain(node: Any) -> bool:
    if isinstance(node, dict):
        return all(isinstance(key, str | int) and _plain(value) for key, value in node.items())
    if isinstance(node, list):
        return all(map(_plain, node))
    return node is None or isinstance(node, str | int | float)
