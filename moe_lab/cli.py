"""`moe-lab VERB ...`: takes the verb off the command line and hands over; nothing heavy is imported before that."""

import errno
import os
import signal
import sys
from importlib import import_module

from moe_lab import __version__

VERBS = {
    "train": "train a model and watch its routers: moe-lab train router=gumbel_ste",
    "sweep": "run a study and judge its claims, or finish it: moe-lab sweep NAME",
    "status": "what became of a sweep's jobs: moe-lab status DIR",
    "watch": "the same, live, until they have ended: moe-lab watch DIR",
    "list": "the groups, and the options of one: moe-lab list router",
    "check": "judge a study's claims: moe-lab check outputs/sweeps/collapse",
    "diff": "how two runs differ in config and outcome: moe-lab diff RUN RUN",
    "export": "a run's metrics as CSV or parquet: moe-lab export RUN",
    "verify": "check that a run is whole, without touching it: moe-lab verify RUN",
    "sync": "upload runs to W&B, those from before or without it too: moe-lab sync DIR",
    "dashboard": "save the W&B workspace for router collapse: moe-lab dashboard ENTITY/PROJECT",
    "report": "a page of what runs and studies came to: moe-lab report DIR...",
    "losses": "what balance losses are worth, here and in other frameworks",
    "info": "versions, devices and paths, to paste into a bug report",
}
HELP = f"""moe-lab {__version__}: which router collapses, which one learns, and what did balancing cost?

usage: moe-lab VERB ...        moe-lab VERB --help tells more

{os.linesep.join(f"  {verb:<9} {about}" for verb, about in VERBS.items())}

Tab completion in bash:  eval "$(moe-lab -sc install=bash)"
Exit codes: 0 ok, 1 a run failed, 2 wrong usage or config (nothing written), 3 diverged, 4 refused
(locked, drifted, corrupt), 5 environment (disk, permission, network), 75 stopped and resumable, 130 Ctrl-C twice
"""


MOST_LINES = 20  # of complaints at once
LONGEST_LINE = 600


def main() -> int:
    """The console script. Returns the exit code."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        quiet_pipe()
        print(HELP, end="")
        return 0
    if argv[0] in ("-V", "--version") or (argv[0] in VERBS and "--version" in argv[1:]):
        print(f"moe-lab {__version__}")
        return 0
    if argv[0] in ("-sc", "--shell-completion"):
        quiet_pipe()
        return import_module("moe_lab.completion").main(argv[1:])
    if argv[0] not in VERBS:
        return complain([f"no such command: {printable(argv[0])}{_nearest_verb(argv[0])}"])
    # Threads of libgomp that spin while they wait slow a shared machine down; spinning briefly costs an
    # idle one 5 % (see docs/design.md). Read when torch is first imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # tensors on huge pages: fewer faults, fewer page walks
    try:
        return import_module(f"moe_lab.verbs.{argv[0]}").main(argv[1:])
    except KeyboardInterrupt:
        complain(["stopped"])
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk, a permission; a name that no file can have is the user's
        return complain([in_words(error)], 2 if error.errno == errno.ENAMETOOLONG else 5)


def quiet_pipe() -> None:
    """End without a word when the reader has gone (`| head`). Not for training, where W&B's socket may break too."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def complain(lines: list[str], code: int = 2) -> int:
    """Print each line to stderr after the program's name, without secrets, and return the exit code."""
    from moe_lab.secrecy import hide

    more = [f"and {len(lines) - MOST_LINES} more mistakes"] if len(lines) > MOST_LINES else []
    for line in (*lines[:MOST_LINES], *more):
        print(f"moe-lab: {cut(printable(hide(line)), LONGEST_LINE)}", file=sys.stderr, flush=True)
    return code


def arguments(verb: str, about: str):
    """A parser that tells a mistake like everything else does: in one line, and printable."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            sys.exit(complain([f"{message}; see {self.prog} --help"]))

    return Parser(f"moe-lab {verb}", description=about)


def cut(text: str, most: int) -> str:
    """Text of at most so many characters: its beginning and its end, where it is longer."""
    half = most // 2 - 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def in_words(error: OSError) -> str:
    """What an operating system's error says, without its number: path: reason."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error.strerror or str(error)


def printable(text: str) -> str:
    """Text from outside on one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _nearest_verb(wrong: str) -> str:
    import difflib

    close = difflib.get_close_matches(wrong, VERBS, n=1)
    train = f"; options belong behind a verb: moe-lab train {printable(wrong)}" if "=" in wrong else ""
    return train or (f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(VERBS)}")
