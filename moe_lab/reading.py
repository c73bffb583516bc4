"""Reading JSON and YAML that anybody may have written: plain values, or ValueError in one line.

A run directory may come from somebody else. What is read from it is data of a known kind: never code, never a
pipe or a device that has no end, never so deep or so large that reading it takes the process down.
"""

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml

LARGEST_JSON = 64 << 20
DEEPEST = 50
LARGEST_YAML = 256 << 10  # a config has a few kilobytes, and yaml is slow to read


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
    lines = content(path).split(b"\n")
    return [row(line, f"{path.name} line {number}") for number, line in enumerate(lines[:-1], 1)]


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


def content(path: Path, most: int | None = None) -> bytes:
    """A regular file's bytes."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name}: is no regular file")
    if most is not None and found.st_size > most:
        raise ValueError(f"{path.name}: {found.st_size:,} bytes, {most:,} at most")
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
