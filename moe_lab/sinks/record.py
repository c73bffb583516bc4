"""A run-ID.wandb file, read to see whether it may be uploaded: whole, and nothing in it that the mirror never writes.

The file is a 7-byte head and blocks of 32 KiB in leveldb's log format. A record is a protobuf in one or more chunks of
(crc 4 bytes, length 2, kind 1, data); kind 1 is a whole record, 2, 3 and 4 are its first, middle and last part. A
block's last bytes, too few for a chunk's head, are filler.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab import reading

BLOCK, HEAD = 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
LONGEST = 64 << 20  # bytes of one record
# `wandb sync` does what a record says. One that names an artifact would have it read any file of this machine.
KNOWN = {
    *("header", "run", "config", "telemetry", "metric", "files", "history", "summary", "stats", "environment"),
    *("preempting", "exit", "final", "footer"),
}
PICTURE = re.compile(r"media/images/([\w-]+/)*[\w-]+\.png")
# Of wandb's own that may stand beside the pictures; both are names in the folder of the run.
OWN_FILES = {"wandb-summary.json", "config.yaml", "wandb-metadata.json", "output.log", "requirements.txt"}


@dataclass
class Record:
    """What matters of a .wandb file."""

    path: Path
    ids: set[str] = field(default_factory=set)
    places: set[tuple[str, str]] = field(default_factory=set)  # (entity, project), the entity may be empty
    steps: list[int] = field(default_factory=list)
    ended: bool = False


def read(path: Path) -> Record:
    """The record in `path`; ValueError in one line where it is damaged, or the work of somebody else."""
    from wandb.proto import wandb_internal_pb2

    parse = vars(wandb_internal_pb2)["Record"].FromString  # made at import, out of sight of a type checker
    found = Record(path)
    for data in chunks_joined(path):
        try:
            record = parse(data)
        except Exception as error:
            raise ValueError(f"{path.name}: holds no record ({type(error).__name__})") from None
        _take(found, record)
    return found


def _take(found: Record, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind not in KNOWN:
        raise ValueError(f"{found.path.name}: holds a record that no run writes ({kind})")
    if kind == "run":
        found.ids.add(record.run.run_id)
        found.places.add((record.run.entity, record.run.project))
    elif kind == "history":
        keys = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        found.steps.append(int(keys["_step"]) if keys.get("_step", "").isdecimal() else -1)
    elif kind == "files":
        for item in record.files.files:
            if not (PICTURE.fullmatch(item.path) or item.path in OWN_FILES):
                raise ValueError(f"{found.path.name}: names a file that no run writes")
    elif kind == "exit":
        found.ended = True


def chunks_joined(path: Path) -> Iterator[bytes]:
    """The bytes of each record, in order; ValueError at the first that is not whole."""
    reading.must_be_regular(path)
    torn = ValueError(f"{path.name}: is damaged or not whole")
    with path.open("rb") as file:
        if file.read(HEAD)[:4] != b":W&B":
            raise torn
        at, parts = HEAD, []
        while True:
            if (left := BLOCK - at % BLOCK) < HEAD:
                file.read(left)
                at += left
                continue
            head = file.read(HEAD)
            if not head and not parts:
                return
            if len(head) < HEAD:
                raise torn
            crc, length, kind = struct.unpack("<IHB", head)
            data = file.read(length)
            at += HEAD + length
            begins = kind in (WHOLE, FIRST)
            if len(data) < length or zlib.crc32(data, zlib.crc32(head[6:])) != crc or begins == bool(parts):
                raise torn
            parts.append(data)
            if kind in (WHOLE, LAST):
                yield b"".join(parts)
                parts = []
            elif kind not in (FIRST, MIDDLE) or sum(map(len, parts)) > LONGEST:
                raise torn
