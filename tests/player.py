"""A player for sinks/mirror.py that writes down what it is told, and fails as it is told."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_lab.sinks.mirror import Mirror, serve


class Notes(Mirror):
    """The sink whose calls `Player` plays."""

    player, title = "player", "notes"


class Player:
    def __init__(self, tell: Callable[[str, str], None]):
        self.tell = tell

    def open(self, path: str, pause: float = 0.0) -> None:
        self.path, self.pause = Path(path), pause
        self._write("open")

    def row(self, value: Any) -> None:
        time.sleep(self.pause)
        self._write(value)

    def fail(self, how: str) -> None:
        if how == "raise":
            raise ConnectionResetError("the service\nis gone")
        if how == "exit":
            sys.exit(0)
        if how == "leave":
            os._exit(0)
        if how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        while how == "hang":
            time.sleep(1)

    def close(self, note: str) -> None:
        self.tell("note", note)
        self._write("close")

    def let_go(self) -> None:
        self._write("let go")

    def _write(self, value: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    serve(Player)
