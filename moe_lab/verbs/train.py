"""`moe-lab train`: Hydra's habits, our help, mistakes told before anything is written."""

import argparse
import contextlib
import errno
import logging
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from moe_lab import places, presets
from moe_lab.cli import complain, in_words, quiet_pipe

log = logging.getLogger(__name__)
MOST_WORDS, MOST_CHARACTERS = 500, 1 << 16  # of a command line; Hydra takes seconds to read more
ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.EIO)


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        from moe_lab.verbs import train_help

        quiet_pipe()
        train_help.show()
        return 0
    if len(argv) > MOST_WORDS or sum(map(len, argv)) > MOST_CHARACTERS:
        size = f"{sum(map(len, argv)):,} characters, words: {len(argv):,}; at most {MOST_CHARACTERS:,} and {MOST_WORDS}"
        return complain([f"the command line is too long ({size}): a config of your own takes more (--config-dir)"])
    from hydra._internal.utils import get_args_parser

    parser: argparse.ArgumentParser = get_args_parser()
    parser.prog, parser.error = "moe-lab train", _usage
    args = parser.parse_intermixed_args(argv)  # flags may stand between overrides
    if args.experimental_rerun or args.config_path:
        return complain(["--experimental-rerun and --config-path are not offered; see resume= and --config-dir"])
    own, problems = own_configs(args.config_dir)
    if problems:
        return complain(problems)
    if "resume=" in args.overrides:  # an unset shell variable, say
        return complain(["resume=: is empty; name a run directory, or leave it out to start a new run"])
    resumed = [o for o in args.overrides if o.startswith("resume=") and o != "resume=null"]
    if len(resumed) > 1 or (resumed and args.multirun):
        return complain(["resume=: goes on with one run at a time, without -m"])
    if resumed:
        from moe_lab.verbs import resume

        return resume.main(resumed[-1].partition("=")[2], [o for o in args.overrides if o not in resumed])
    return _through_hydra(args, argv, own)


def own_configs(named: str | None) -> tuple[Path | None, list[str]]:
    """The folder of the user's own configs, and what is wrong with it."""
    from moe_lab import reading

    own = Path(named) if named else presets.own_dir()
    if own is None:
        return None, []
    if problems := places.named("--config-dir or MOE_LAB_CONFIG_DIR", str(own)):
        return None, problems
    if not own.is_dir():
        return None, [f"{own}: no such config directory (--config-dir or MOE_LAB_CONFIG_DIR)"]
    return own, presets.clashes(own) or reading.too_much(presets.choosable(own))


def _usage(message: str) -> NoReturn:
    dashed = re.search(r"arguments: --([\w.]+=\S+)", message)
    hint = f"options have no dashes: {dashed[1]}" if dashed else "see moe-lab train --help"
    sys.exit(complain([f"{message}; {hint}"]))


def _through_hydra(args: argparse.Namespace, argv: list[str], own: Path | None) -> int:
    from moe_lab import hydra_app

    config_name = args.config_name or "train"
    shows = args.cfg or args.info or args.hydra_help
    try:
        with hydra_app.open_hydra(own) as app:
            if shows:
                hydra_app.compose_one(app, config_name, args.overrides)
            else:
                plan = hydra_app.plan(app, config_name, args.overrides, args.multirun)
                return _sweep(app, args, argv, plan) if plan.multirun else _start(app, config_name, plan)
    except hydra_app.Refused as refused:
        return complain(refused.lines)
    quiet_pipe()
    flags = [word for word in argv if word not in args.overrides]
    hydra_app.hydra_command(config_name, own if not args.config_dir else None, [*args.overrides, *flags])
    return 0


def _start(app: Any, config_name: str, plan: Any) -> int:
    """Let Hydra run the job; the exit code."""
    try:
        app.run(config_name, job, plan.overrides)
    except OSError as error:  # Hydra could not make the directory
        return no_place(error)
    return 0


def no_place(error: OSError) -> int:
    return complain([f"{in_words(error)}; output_dir= names another place for runs"], 5)


def _sweep(app: Any, args: argparse.Namespace, argv: list[str], plan: Any) -> int:
    """An ad-hoc grid: every job a process, or one of a launcher of Hydra's; the exit code."""
    from moe_lab import hydra_jobs
    from moe_lab.study.folder import Job, Sweep, command_line
    from moe_lab.verbs.sweep import run

    asked = hydra_jobs.ask(app, args.config_name or "train", plan.overrides)
    checked = list({job.dir: job for job in hydra_jobs.check(asked, hydra_jobs.grid(asked))}.values())
    jobs = [Job("", job.cfg["seed"], job.words, job.dir) for job in checked]
    sweep = Sweep(asked.folder, asked.sweep["name"], None, None, jobs, command_line("train", argv))
    flags = [f"--config-name={args.config_name}"] if args.config_name else []
    return run(sweep, asked, checked, [*flags, *([f"--config-dir={args.config_dir}"] if args.config_dir else [])])


def job(cfg: Any) -> dict[str, Any]:
    """One run, called by Hydra with the composed config; in a sweep a failed run does not end the others."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from moe_lab.naming import plain, register_resolvers
    from moe_lab.run import read_status

    register_resolvers()  # a launcher may have started a new process
    hydra = HydraConfig.get()
    folder, sweep = Path(hydra.runtime.output_dir), hydra.mode == RunMode.MULTIRUN
    choices = {key: str(value) for key, value in hydra.runtime.choices.items() if not key.startswith("hydra/")}

    def go() -> dict[str, Any]:
        from moe_lab.train import train

        return train(plain(cfg), folder, list(hydra.overrides.task), choices)

    done = (read_status(folder) or {}).get("status") == "completed"
    summary = guarded(go, folder)
    code = summary.get("exit", 0)
    if code == 75 and "SIGUSR2" in summary["message"]:
        ask_for_another_try()
    if done and not code:
        print(f"{folder}: was completed before")
    if code in (2, 5) and not sweep and not (folder / "env.json").exists():  # it never began
        with contextlib.suppress(OSError):  # a disk that failed may fail again; the message stands
            forget(folder, Path(cfg.output_dir))
    ends_all = code in (75, 130) and hydra.runtime.choices["hydra/launcher"] == "basic"  # one process for all jobs
    if code and (not sweep or ends_all):
        complain([summary["message"]] if summary["message"] else [])
        raise SystemExit(code)
    if code:
        log.error("%s", summary["message"])
    return summary


def ask_for_another_try() -> None:
    """Hand SIGUSR2 on to submitit, which has Slurm queue the job again and ends this process."""
    if callable(signal.getsignal(signal.SIGUSR2)):
        with contextlib.suppress(Exception):  # the job may not try again; the run has said already how it ended
            signal.raise_signal(signal.SIGUSR2)


def guarded(go: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The run's summary, or {"exit": code, "message": line} where it ended in any other way."""
    from moe_lab.reading import Damaged
    from moe_lab.run import Stop, outcome

    try:
        return go()
    except Stop as stop:
        return {"exit": stop.code, "message": stop.message}
    except KeyboardInterrupt:
        return {"exit": 130, "message": f"stopped at once; {folder} goes on from its last checkpoint, if it has one"}
    except OSError as error:
        if type(error).__name__ in ("DatasetUnavailable", "Unusable") or error.errno in ENVIRONMENT:
            return {"exit": 5, "message": in_words(error)}
        if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ELOOP):  # in the place of a file that a run writes
            return {"exit": 4, "message": in_words(error)}
        if error.errno == errno.ENAMETOOLONG and not (folder / "env.json").exists():
            return {"exit": 2, "message": in_words(error)}
        return _unexpected(error)
    except Damaged as damaged:
        log.info("what was read: %s", damaged, exc_info=True)  # into train.log
        return {"exit": 4, "message": str(damaged)}
    except ValueError as error:
        if (folder / "env.json").exists():  # it ran already: not the user's mistake
            return _unexpected(error)
        return {"exit": 2, "message": str(error)}
    except Exception as error:
        if outcome(error)[0] == "oom":
            said = (str(error).splitlines() or ["it says no more"])[0]
            return {"exit": 1, "message": f"out of memory ({said}); make the model, the batch or the data smaller"}
        return _unexpected(error)


def _unexpected(error: Exception) -> dict[str, Any]:
    log.exception("the run failed")  # with its traceback, to train.log and to the terminal
    return {"exit": 1, "message": f"{type(error).__name__}: {error}"}


def forget(folder: Path, root: Path) -> None:
    """Remove a run directory in which nothing was trained, and the folders above it that this leaves empty."""
    made = ("train.log", "config.yaml", "overrides.txt", "status.json", ".lock", "metrics.jsonl", "timing.jsonl")
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        return
    for name in made:
        (folder / name).unlink(missing_ok=True)
    for empty in (folder, *folder.parents):
        if any(empty.iterdir()) or not (empty == folder or empty.is_relative_to(root.absolute())):
            return
        empty.rmdir()
