"""Processes of a sweep, forked from one that has imported torch already: the import is paid once.

Each is a session of its own, so that Ctrl-C reaches the driver alone. It ends with its driver: SIGTERM reaches it when
the driver's end of its pipe closes, however the driver died, and a run that is told SIGTERM writes a checkpoint.
"""

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moe_lab.hydra_jobs import quoted
from moe_lab.reading import lines

HEAVY = ["moe_lab.train", "moe_lab.hydra_app", "moe_lab.verbs.train", "moe_lab.verbs.resume"]
PATIENCE = 60.0  # seconds for the lock of a run whose earlier process still writes its checkpoint
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


class Child:
    """`moe-lab WORDS` in a process of its own, which says everything into a log."""

    target: Callable[..., None]

    def __init__(self, words: list[str], log: Path, run_dir: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process = _forks().Process(target=self.target, args=(words, log, run_dir, os.getcwd(), dict(os.environ)))
        self.process.start()
        self.started = time.monotonic()

    @property
    def sentinel(self) -> int:
        """A file descriptor that is readable once it has ended."""
        return self.process.sentinel

    @property
    def exitcode(self) -> int | None:
        return self.process.exitcode

    def stop(self) -> None:
        """SIGTERM: it writes a checkpoint and ends."""
        self.process.terminate()

    def kill(self) -> None:
        """SIGKILL, with all that it started."""
        assert self.process.pid is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # so early that it leads no group yet, or it has ended
            self.process.kill()

    def close(self) -> None:
        self.process.join()
        self.process.close()


def ask(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of ours returns in a process of its own, which has torch: the driver stays small."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = _forks().Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        good, answer = ours.recv()
    except EOFError:
        raise OSError(f"a process that was to measure ended with {process.exitcode}") from None
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        ours.close()
        process.join()
        process.close()
    if not good:
        raise answer
    return answer


def words_of(overrides: list[str], run_dir: Path, more: list[str]) -> list[str]:
    """The command line of a job: what anybody can type to run it again."""
    return ["train", *overrides, *more, f"hydra.run.dir={quoted(str(run_dir))}"]


def _forks():
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when the forkserver imports torch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    heed = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a terminal's Ctrl-C is for the driver alone
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, heed)
    return context


def _job(words: list[str], log: Path, run_dir: Path, cwd: str, env: dict[str, str]) -> None:
    from moe_lab.cli import main

    set_up(log, run_dir, cwd, env)
    sys.argv = ["moe-lab", *words]
    sys.exit(main())


Child.target = staticmethod(_job)


def set_up(log: Path, run_dir: Path, cwd: str, env: dict[str, str]) -> None:
    """Make a process that was just forked a job's."""
    os.setsid()
    _speak_into(log)
    _end_with_the_driver()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    _wait_for_lock(run_dir / ".lock")


def _answer(to: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        answer = True, function(*args)
    except Exception as error:
        answer = False, error
    with contextlib.suppress(BrokenPipeError):  # whoever asked has ended
        to.send(answer)


def _speak_into(log: Path) -> None:
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _end_with_the_driver() -> None:
    """SIGTERM when the driver ends (its end of our pipe closes) or when the forkserver, our parent, does."""
    driver = multiprocessing.parent_process()
    if sys.platform != "linux" or driver is None:
        return
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)
    pipe = driver.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # it ended before anybody could tell us
        sys.exit(75)


def _wait_for_lock(lock: Path) -> None:
    """An earlier process of the same run may still write its last checkpoint."""
    patience = time.monotonic() + PATIENCE
    while lock.exists() and time.monotonic() < patience:
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)


def last_words(log: Path) -> str | None:
    """The last complaint in a log, or its last line."""
    said = [line.decode(errors="replace").strip() for line in lines(log)] if log.is_file() else []
    complaints = [line.removeprefix("moe-lab: ") for line in said if line.startswith("moe-lab: ")]
    return next(iter(complaints[::-1] or [line for line in said[::-1] if line]), None)
