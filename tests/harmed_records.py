"""Records of W&B as damage, a crash or an attacker would leave them: each harms a real .wandb file."""

import struct
import zlib
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2
from wandb_reader import records


def empty() -> Any:
    """A record without content; its class is made at import, out of sight of a type checker."""
    return vars(wandb_internal_pb2)["Record"]()


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorter(path: Path) -> None:
    """A row is missing, all else is whole."""
    rewrite(path, [r for r in all_of(path) if r.WhichOneof("record_type") != "history" or r.num % 2])


def other_run(path: Path) -> None:
    rewrite(path, [_changed(r, "run_id", "other") for r in all_of(path)])


def other_project(path: Path) -> None:
    rewrite(path, [_changed(r, "entity", "mallory") for r in all_of(path)])


def steals_a_file(path: Path) -> None:
    """`wandb sync` would upload what the record names."""
    evil = empty()
    evil.files.files.add().path = "../../../../../../../../etc/passwd"
    rewrite(path, [*all_of(path), evil])


def steals_by_artifact(path: Path) -> None:
    evil = empty()
    entry = evil.artifact.manifest.contents.add()
    entry.path, entry.local_path = "x", "/etc/passwd"
    rewrite(path, [*all_of(path), evil])


def all_of(path: Path) -> list[Any]:
    return list(records(path))


def _changed(record: Any, field: str, value: str) -> Any:
    if record.WhichOneof("record_type") == "run":
        setattr(record.run, field, value)
    return record


def rewrite(path: Path, found: list[Any]) -> None:
    """A file of these records, sealed as wandb seals it."""
    out = bytearray(path.read_bytes()[:7])
    for record in found:
        data, first = record.SerializeToString(), True
        while data or first:
            if (left := 32768 - len(out) % 32768) < 7:
                out += b"\0" * left
                continue
            part, data = data[: left - 7], data[left - 7 :]
            kind = (2 if data else 1) if first else (3 if data else 4)
            out += struct.pack("<IHB", zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind) + part
            first = False
    path.write_bytes(out)


HARMS = [
    (torn, "damaged or not whole"),
    (flipped, "damaged or not whole"),
    (shorter, "does not hold the rows"),
    (other_run, "of another run"),
    (other_project, "goes elsewhere"),
    (steals_a_file, "names a file that no run writes"),
    (steals_by_artifact, "holds a record that no run writes (artifact)"),
]
