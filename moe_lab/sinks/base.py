"""What a sink is: something that is told about a run while it happens, and can never stop it."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

log = logging.getLogger(__name__)
P = ParamSpec("P")  # the `[**P]` syntax needs Python 3.12


class Sink:
    """Gets the rows of one run, in order. Every method may be left out.

    facts (all that is known before the first step): layers, experts, k, steps, params, tags, router, dataset,
    resumed_from (step or None), git; and destinations, the `describe()` of the sinks opened before this one, brought
    up to date before `close`.
    """

    failed = False

    def open(self, run_dir: Path, cfg: dict[str, Any], facts: dict[str, Any]) -> None:
        """Called once, before the first row."""

    def row(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        """One metrics row and the timing row of the same step (both may be sparse, flat keys)."""

    def verdict(self, step: int, layer: int, old: str | None, new: str, why: str, remedies: list[str]) -> None:
        """The verdict on a layer changed at `step`."""

    def close(self, status: str, summary: dict[str, Any]) -> None:
        """Called once, also when the run failed: status is that of status.json, summary that of summary.json."""

    def wait(self) -> None:
        """Called after `close`, unless the user is in a hurry: time for what goes on elsewhere."""

    def describe(self) -> str:
        """One line that says where the data goes; empty if there is nothing to say."""
        return ""


def guarded(method: Callable[P, None]) -> Callable[P, None]:
    """For the methods of a mirror: an exception inside switches the sink off with one warning.

    `close` still runs on a sink that was switched off, so that it can let go of what it holds.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        sink: Any = args[0]
        if sink.failed and method.__name__ != "close":
            return
        try:
            method(*args, **kwargs)
        except Exception as error:
            first, sink.failed = not sink.failed, True
            if first:
                log.warning("%s is switched off, the run goes on: %s", type(sink).__name__, one_line(error))

    return call


def one_line(error: Exception) -> str:
    """An exception as one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
