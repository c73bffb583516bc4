"""`moe-lab sync DIR...`: runs that were recorded offline, or not at all, go to W&B now."""

import fcntl
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from moe_lab import places
from moe_lab.cli import arguments, complain, printable, quiet_pipe
from moe_lab.reading import Damaged
from moe_lab.recorded import read
from moe_lab.sinks.account import PATIENCE, WITHOUT_KEY, has_key
from moe_lab.sinks.wandb import resolve_mode

ABOUT = """Upload runs to W&B: what lies in a run's wandb folder by `wandb sync`, and where there is nothing, or it is
damaged, torn or not the run's, a record made anew from metrics.jsonl, with the same id, keys, group and tags. DIR is
a run, or a folder with runs in it such as a sweep's. With WANDB_MODE=offline records are made and nothing is sent."""


class Unreachable(Exception):
    """The server did not take a run; says why."""


def main(argv: list[str]) -> int:
    parser = arguments("sync", ABOUT)
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="a run, or a folder with runs in it")
    parser.add_argument("--rebuild", action="store_true", help="make the record anew, whatever is there")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    asked = parser.parse_args(argv)
    folders = [run for folder in asked.dirs for run in runs_in(folder)]
    if empty := [folder for folder in asked.dirs if not runs_in(folder)]:
        return complain([f"{folder}: no run directory, and none in it (no config.yaml)" for folder in empty])
    mode = resolve_mode("auto" if os.environ.get("WANDB_MODE") else "online")
    if mode == "disabled":
        return complain(["WANDB_MODE=disabled: nothing goes to W&B"])
    if importlib.util.find_spec("wandb") is None:
        return complain(["wandb is not installed here: pip install wandb"], 5)
    if mode == "online" and not asked.dry_run and not has_key():
        return complain([WITHOUT_KEY], 5)
    quiet_pipe()
    codes = []
    for folder in dict.fromkeys(folders):
        try:
            codes.append(sync(folder, asked.rebuild, asked.dry_run, online=mode == "online"))
        except Unreachable as error:  # the next run would fare no better
            return complain([f"{folder}: W&B did not take it: {error}"], 5)
        except ValueError as error:
            codes.append(complain([str(error)], 4 if isinstance(error, Damaged) else 2))
    return max(codes)


def runs_in(folder: Path) -> list[Path]:
    """The run directories at and below a folder, in order; links are not followed."""
    found = []
    for parent, folders, names in os.walk(os.path.abspath(folder)):
        folders.sort()
        if "config.yaml" in names:
            found.append(Path(parent))
            folders.clear()
    return found


def sync(folder: Path, rebuild: bool, dry: bool, online: bool) -> int:
    """Do what is to be done for one run, and say it; the exit code."""
    from moe_lab import replay

    if problem := places.leads_out(folder):
        return complain([problem], 4)
    if (folder / "wandb/settings").exists():  # could name another server, and the key would go there
        return complain([f"{folder}: holds settings of wandb's (wandb/settings), which no run writes"], 4)
    if _runs(folder):
        return complain([f"{folder}: is running; sync it when it has ended"], 4)
    plan = replay.plan(read(folder), rebuild)
    what = f"{len(plan.run.rows)} rows to {plan.destination}"
    if plan.uploaded:
        _say(folder, "was uploaded before (--rebuild sends it again)")
    elif dry and plan.why:
        _say(folder, f"would rebuild the record ({plan.why})" + (f" and upload {what}" if online else ""))
    elif dry:
        _say(folder, f"would upload {what}: {', '.join(path.parent.name for path in plan.files)}")
    else:
        files = plan.files
        if plan.why:
            files = [replay.make(plan.run)]
            _say(folder, f"record rebuilt ({plan.why}): {files[0].parent.name}")
        _say(folder, f"uploaded {what}{_upload(files)}" if online else "is recorded offline")
    return 0


def _say(folder: Path, what: str) -> None:
    print(printable(f"{os.path.relpath(folder)}: {what}"), flush=True)


def _runs(folder: Path) -> bool:
    """Whether a process holds the run's lock."""
    try:
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _upload(files: list[Path]) -> str:
    """Hand the files to `wandb sync`; where the run can be seen, as the end of a sentence."""
    env = PATIENCE | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-P", "-m", "wandb", "sync", "--include-online", *map(str, files)]
    # wandb takes settings from, and writes a log to, the wandb folder of where it runs: that may be somebody's run.
    with tempfile.TemporaryDirectory() as cwd:
        env |= {"WANDB_DIR": cwd}
        done = subprocess.run(words, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    said = done.stdout + done.stderr
    marks = [path.with_suffix(".wandb.synced") for path in files]
    wrong = re.search(r"ERROR (.*)", said)
    if done.returncode or wrong or not all(mark.exists() for mark in marks):
        for mark in marks:  # wandb marks a file even where the server took a part of it
            mark.unlink(missing_ok=True)
        raise Unreachable(wrong[1] if wrong else " ".join(said.split())[-300:])
    url = re.search(r"View run .* at (http\S+)", said)
    return f", {url[1]}" if url else ""
