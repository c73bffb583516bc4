"""A sweep's jobs in this process, one after another, as a driver sees them: for tests that patch or watch them."""

import contextlib
import os
import sys
import time
from pathlib import Path

from moe_lab.cli import main


class Job:
    """Like study.worker.Child, but it has ended when it is made."""

    def __init__(self, words: list[str], log: Path, run_dir: Path):
        self.started, argv = time.monotonic(), sys.argv
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            sys.argv = ["moe-lab", *words]
            try:
                self.exitcode = main()
            except SystemExit as left:
                self.exitcode = left.code if isinstance(left.code, int) else 1
            finally:
                sys.argv = argv
        self.sentinel = os.open(os.devnull, os.O_RDONLY)  # always readable

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None:
        os.close(self.sentinel)
