"""A sink in a process of its own: the training puts lines into a queue, and never waits for it nor ends with it.

A thread alone would keep the loop from waiting, but not from sharing its interpreter with whatever the sink does: its
imports, its crashes, its hooks on the way out. A process can be left behind.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_lab.sinks.base import Sink, one_line

log = logging.getLogger(__name__)
QUEUE = 1000  # calls; a mirror that lags further behind loses rows, the run no memory
DEADLINE = 9.0  # seconds after the end of a run; then the mirror is left behind


class Mirror(Sink):
    """Plays calls to the module `player` (see `serve`), which runs in another process.

    The breaker: that process ends with its first error, and from then on nothing is sent. What goes wrong is told in
    one warning; whatever follows from it is only logged.
    """

    player: str
    title: str

    def __init__(self) -> None:
        self.note = ""
        self.calls: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.child: subprocess.Popen[bytes] | None = None
        self.ended = threading.Event()
        self.lost, self.warned, self.done = 0, False, False
        self.until = 0.0

    def describe(self) -> str:
        note = f"switched off{self.advice()}" if self.failed else self.note
        return f"{self.title}: {note}" if note else ""

    def advice(self) -> str:
        """What to do about a mirror that is not whole, as the end of a sentence."""
        return ""

    def start(self) -> None:
        """Start the process and the two threads that speak to it."""
        try:
            self.child = subprocess.Popen(
                [sys.executable, "-P", "-m", self.player],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the training, which ends its mirrors itself
            )
        except OSError as error:
            self.break_off(one_line(error))
            return
        for work in (self._feed, self._listen):
            threading.Thread(target=work, name=f"mirror-{work.__name__}", daemon=True).start()

    def send(self, call: str, *values: Any) -> None:
        """Put a call into the queue, with its values as they are now."""
        if self.child is None or self.failed:
            return
        if self.calls.qsize() >= QUEUE:
            self.lost += 1
            return
        self.calls.put(_line(call, *values))

    def end(self, call: str, *values: Any) -> None:
        """Put the last call into the queue; it has room there whatever else waits. The clock of `wait` starts."""
        self.calls.put(_line(call, *values))
        self.calls.put(None)
        self.until = time.monotonic() + DEADLINE

    def wait(self) -> None:
        """Until the process has played every call, or the deadline has passed."""
        if self.child is None:
            return
        if not self.ended.wait(max(0.0, self.until - time.monotonic())):
            self.break_off(f"it did not end within {DEADLINE:g} s of the run")
            self.child.kill()
            self.ended.wait(1.0)
        if self.lost:
            self.warn(f"it was too slow for {self.lost} rows")

    def break_off(self, why: str) -> None:
        self.failed = True
        self.warn(f"switched off, the run goes on: {why}")

    def warn(self, what: str) -> None:
        """One warning for a run; what comes after it is for train.log."""
        level = logging.INFO if self.warned else logging.WARNING
        self.warned = True
        log.log(level, "%s: %s; metrics.jsonl has every row%s", self.title, what, self.advice())

    def hear(self, kind: str, text: str) -> None:
        """What the process reports: a `note` for `describe`, a reason to `warn`; at last `done`, or its `error`."""
        if kind == "note":
            self.note = text
            log.info("%s", self.describe())
        elif kind == "warn":
            self.warn(text)
        elif kind == "error":
            self.break_off(text)
        else:
            self.done = True

    def _feed(self) -> None:
        assert self.child is not None and self.child.stdin is not None
        with contextlib.suppress(OSError), self.child.stdin as pipe:  # a process that is gone is noticed by `_listen`
            for line in iter(self.calls.get, None):
                pipe.write(line)
                pipe.flush()

    def _listen(self) -> None:
        assert self.child is not None and self.child.stdout is not None
        for report in self.child.stdout:
            self.hear(*json.loads(report))
        code = self.child.wait()
        if not self.done and not self.failed:
            self.break_off(f"its process ended with code {code}")
        self.ended.set()


def _line(call: str, *values: Any) -> bytes:
    return json.dumps([call, *values]).encode() + b"\n"


def serve(player: Callable[[Callable[[str, str], None]], Any]) -> None:
    """The other process: play the calls of stdin, in order, to `player(tell)`, up to `close` or the first error.

    A run whose process dies sends no `close`. `let_go` then saves what can be saved, as after an error. A scheduler's
    signal to every process of a job does not end this one; what the sink started may end (wandb-core does, and the
    record then ends there).
    """
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(stop, signal.SIG_IGN)
    calls, reports = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # nobody else, and no process that is started from here, reads or writes there
        os.dup2(nowhere, stream)

    def tell(kind: str, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more
            os.write(reports, _line(kind, text))

    played = player(tell)
    try:
        call = ""
        for line in calls:
            call, *values = json.loads(line)
            if call == "close":
                _die_soon()
            getattr(played, call)(*values)
        if call != "close":
            raise EOFError("the run's process died")
        tell("done", "")
    except Exception as error:
        tell("error", one_line(error))
        _die_soon()
        with contextlib.suppress(Exception):
            played.let_go()


def _die_soon() -> None:
    """Whoever waited for this process has gone by then."""
    signal.alarm(int(DEADLINE) + 1)
