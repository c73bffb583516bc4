"""The run in the terminal: a live screen where there is one, else one plain line per log step."""

import time
from pathlib import Path
from typing import Any

import rich
from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from moe_lab.sinks.base import Sink, guarded
from moe_lab.sinks.board import State, dashboard, headline, short
from moe_lab.sinks.lines import closing, evaluation, start_lines, step_line, verdict_line

REFRESH = 0.1  # seconds between redraws at most; drawing costs the training process its time


class Console(Sink):
    """Draws on rich's one console, so that log messages appear above the live screen instead of tearing it."""

    def __init__(self, console: RichConsole | None = None):
        self.console = console or rich.get_console()
        # FORCE_COLOR makes rich call any file a terminal, and a live screen in a file is thousands of screens.
        terminal = self.console.is_interactive and self.console.file.isatty()
        self.lively = terminal and self.console.encoding.startswith("utf")
        self.live: Live | None = None
        self.state = State()
        self.drawn = 0.0

    @guarded
    def open(self, run_dir: Path, cfg: dict[str, Any], facts: dict[str, Any]) -> None:
        self.state = State(run_dir=short(run_dir), facts=facts)
        for line in start_lines(self.state.run_dir, facts):
            self._say(Text(line))
        if not self.lively:
            self._say(Text(headline(facts)))
        if self.lively:
            self.live = Live(self._screen(), console=self.console, auto_refresh=False)
            self.live.start(refresh=True)

    @guarded
    def row(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        self.state.take(row, timing)
        if self.live is not None:
            if time.monotonic() - self.drawn > REFRESH:
                self.live.update(self._screen(), refresh=True)
                self.drawn = time.monotonic()
            return
        self._say(Text(step_line(row, timing, self.state.facts.get("steps") or 0)))
        if "eval/loss" in row:
            self._say(evaluation(row))

    @guarded
    def verdict(self, step: int, layer: int, old: str | None, new: str, why: str, remedies: list[str]) -> None:
        self.state.changed[layer] = step
        line = verdict_line(step, layer, old, new, why)
        if old or new != "healthy":
            self.state.news.append((new, line))
        if self.live is None:
            self._say(Text(line))

    @guarded
    def close(self, status: str, summary: dict[str, Any]) -> None:
        if self.live is not None:
            self.live.update(self._screen(), refresh=True)
            self.live.stop()
            self.live = None
        self._say(closing(status, summary, self.state))

    def _screen(self) -> Any:
        return dashboard(self.state, self.console.width, self.console.height)

    def _say(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)  # long paths stay whole when copied
