"""`moe-lab ...` in this process, the jobs of a sweep too: what it printed and its exit code, with the process put back
as it was."""

import contextlib
import io
import logging
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import in_process

from moe_lab.cli import main
from moe_lab.study import worker


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


def moe_lab(*words: str) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with _as_it_was(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["moe-lab", *words]
        try:
            code = main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    return Said(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    argv, root, child = sys.argv, logging.getLogger(), worker.Child
    worker.Child = in_process.Job  # type: ignore[misc]
    handlers, level, pipe = root.handlers[:], root.level, signal.getsignal(signal.SIGPIPE)
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        sys.argv, root.handlers[:], worker.Child = argv, handlers, child  # type: ignore[misc]
        root.setLevel(level)  # loggers remember what the root's level allowed; this makes them ask again
        signal.signal(signal.SIGPIPE, pipe)


def tree(folder: Path) -> set[str]:
    """Every file and folder below, to see that nothing was written."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
