"""Log messages on the terminal, above the live screen where there is one. Named by conf/hydra/job_logging."""

import logging
import sys


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
