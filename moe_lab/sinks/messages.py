"""Log messages on the terminal, above the live screen where there is one. Named by conf/hydra/job_logging."""

import errno
import logging
import os
import sys
from typing import Any

from moe_lab.secrecy import hide


class Formatter(logging.Formatter):
    """Messages without secrets and without the characters that steer a terminal, in train.log as well."""

    def format(self, record: logging.LogRecord) -> str:
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in hide(super().format(record)))


class LogFile(logging.FileHandler):
    """Appends to a file, but never through a link: what stands in its place might lead out of the run directory."""

    failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it could not be opened
            self.handleError(record)

    def _open(self) -> Any:
        try:
            return open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=_no_link)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return open(os.devnull, "w")  # the run itself is refused, see Run

    def handleError(self, record: logging.LogRecord) -> None:
        """A log that cannot be written is no reason to stop, nor for a traceback: one line, once."""
        if not self.failed:
            self.failed = True
            print(f"WARNING: {self.baseFilename} is incomplete: {sys.exception()}", file=sys.stderr, flush=True)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class TerminalHandler(logging.Handler):
    """Prints through rich's one console on a terminal, and plainly to stderr elsewhere."""

    def emit(self, record: logging.LogRecord) -> None:
        import rich
        from rich.text import Text

        try:
            line = "".join(c if c.isprintable() or c == "\n" else "?" for c in self.format(record))
            console = rich.get_console()
            if console.is_terminal:
                style = "red" if record.levelno >= logging.ERROR else "yellow"
                console.print(Text(line, style), soft_wrap=True, highlight=False)
            else:
                print(line, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)
