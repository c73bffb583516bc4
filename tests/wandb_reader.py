"""Reads a run-ID.wandb file: protobuf records in leveldb's log format.

The file is a 7-byte head, then blocks of 32 KiB; a record is one or more chunks of (crc 4 bytes, length 2, kind 1,
data) where kind is 1 for a whole record and 2, 3, 4 for its first, middle and last part. A block's last bytes, too
few for a chunk's head, are filler.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

Record: Any = vars(pb)["Record"]  # made at import, out of sight of a type checker
BLOCK, HEAD = 32768, 7
WHOLE, FIRST, LAST = 1, 2, 4


@dataclass
class Recorded:
    """What a .wandb file holds of a run."""

    id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of the file, in order."""
    data, at, parts = path.read_bytes(), HEAD, []
    assert data[:4] == b":W&B", path
    while at + HEAD <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEAD:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        chunk = data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        parts = [chunk] if kind in (WHOLE, FIRST) else [*parts, chunk]
        if kind in (WHOLE, LAST):
            yield Record.FromString(b"".join(parts))


def read(path: Path) -> Recorded:
    """The run in `path` as plain values; later records overwrite earlier ones, as on the server."""
    out = Recorded()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            out.id, out.project, out.name = run.run_id, run.project, run.display_name
            out.group, out.job_type, out.tags = run.run_group, run.job_type, list(run.tags)
            out.config |= _items(run.config.update)
        elif kind == "config":
            out.config |= _items(record.config.update)
        elif kind == "history":
            out.history.append(_items(record.history.item))
        elif kind == "summary":
            out.summary |= _items(record.summary.update)
        elif kind == "metric":
            out.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "exit":
            out.exit_code = record.exit.exit_code
    return out


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
