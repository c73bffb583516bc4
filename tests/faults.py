"""Make the n-th file operation of this process fail or be its last, as SQLite's tests do: n = 1, 2, ... to the end.

Only for a process that was forked for it: nothing is put back.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "truncate")
REAL_OPEN = io.open


@dataclass
class Fault:
    """at: which operation, from 1. how: "kill" or the name of an errno; a write is killed when half of it is done."""

    at: int
    how: str
    seen: int = 0

    def install(self, told: Path) -> None:
        """From here on count what changes files; when it is hit, the file `told` says what was."""
        self.told = told
        for name in CHANGES:
            setattr(os, name, self._counted(name, getattr(os, name)))
        builtins.open = io.open = self._open  # pathlib uses the latter

    def meet(self, what: str) -> bool:
        """Count one operation: whether to die in it. OSError where it is to fail."""
        self.seen += 1
        if self.seen != self.at:
            return False
        with REAL_OPEN(self.told, "w") as file:
            file.write(f"{self.at}: {what}")
        if self.how != "kill":
            number = getattr(errno, self.how)
            raise OSError(number, os.strerror(number))
        return True

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "mkdir" and os.path.isdir(args[0]):  # which fails anyway
                return real(*args, **kwargs)
            try:
                dies = self.meet(f"{name} {args[0]}")
            except OSError as error:  # as the real one says it
                raise named(error, *(a for a in args if isinstance(a, str | os.PathLike))) from None
            return die() if dies else real(*args, **kwargs)

        return call

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax"):
            return REAL_OPEN(file, mode, buffering, *args, **kwargs)
        try:
            dies = self.meet(f"open {file}")
        except OSError as error:
            raise named(error, file) from None
        if dies:
            die()
        raw = Raw(file, mode.replace("b", "").replace("t", ""), opener=kwargs.pop("opener", None))
        raw.fault = self
        if buffering == 0:
            return raw
        return io.BufferedWriter(raw) if "b" in mode else io.TextIOWrapper(io.BufferedWriter(raw), *args, **kwargs)


class Raw(io.FileIO):
    fault: Fault

    def write(self, content: Any) -> int:
        if self.fault.meet(f"write {self.name}"):
            content = bytes(content)
            super().write(content[: len(content) // 2])
            die()
        return super().write(content)


def named(error: OSError, *paths: Any) -> OSError:
    return OSError(error.errno, error.strerror, *map(os.fspath, paths[:1]))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
