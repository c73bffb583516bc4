"""What is refused: how it must look from outside, and a folder full of files that cannot serve."""

import os
import time
from pathlib import Path

from tests.command import moe_lab, tree
from tests.edges import SMALL

CLUSTERS, OTHER = SMALL[1:3], [SMALL[0], *SMALL[3:]]
FILES = {
    "empty.txt": b"",
    "one.txt": b"a",
    "short.txt": b"1234567",
    "mark.txt": b"\xef\xbb\xbf12345",
    "latin.txt": b"plain text\n" * 40 + b"na\xefve\n",
    "utf16.txt": "hello world\n".encode("utf-16") * 40,
    "good.txt": b"hello world\n" * 40,
    "folder/binary.bin": b"\xff\xfe\x00" * 500,
    "empty/.keep": b"",
    "afile": b"x",
    "rows.jsonl": b'{"text": "hello world"}\n' * 40,
    "rows.xyz": b"x",
}


def lay_out(folder: Path) -> None:
    """Put the files, a pipe and a link to itself into a folder."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")


def refused(code: int, here: Path, *words: str, told: list[str]) -> None:
    before, began = tree(here), time.process_time()
    said = moe_lab(*words)
    assert said.code == code, said
    assert said.out == "" and len(said.err.splitlines()) == 1 and said.err.startswith("moe-lab: "), said
    assert "Traceback" not in said.err and "Errno" not in said.err.replace("([Errno 111]", "") and len(said.err) < 700
    assert all(part in said.err for part in told), said.err
    assert tree(here) == before
    assert time.process_time() - began < 10  # seconds of CPU, for what would take minutes
