"""`moe-lab sweep NAME [OVERRIDES]`: runs a study of sweeps/; the same command again finishes it, after anything."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from moe_lab import presets
from moe_lab.cli import arguments, complain, quiet_pipe

ABOUT = """Runs every job of a study in a process of its own, judges its claims and writes a report. The same command
again finishes it: what is completed is not run again, what was interrupted goes on, new arms and seeds are added."""
WORDS = """overrides: scale=quick|cpu|gpu, arm=a,b and seed=range(10) choose; any other key goes to every job (steps=50)
or, with commas, widens the grid (optim.lr=0.001,0.01). sweep.name= names another folder below outputs/sweeps."""


def main(argv: list[str]) -> int:
    parser = arguments("sweep", ABOUT)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", metavar="NAME", help="a study (below), or a file of your own")
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="scale=, arm=, seed=, any key of moe-lab train"
    )
    parser.add_argument("--jobs", type=int, help="at a time; default: one per core, on a GPU as many as fit")
    parser.add_argument("--timeout", type=float, metavar="MINUTES", help="end a job that takes longer")
    parser.add_argument("--fresh", action="store_true", help="run again what other sources of moe-lab have finished")
    parser.add_argument("--dry-run", action="store_true", help="how many jobs, how long, how much disk; runs none")
    parser.add_argument("--config-dir", help="a folder of your own configs")
    if "--help" in argv or "-h" in argv:
        quiet_pipe()
        parser.epilog = f"{WORDS}\n\nstudies:\n{_studies()}"
    args = parser.parse_intermixed_args(argv)
    for flag, value in (("--jobs", args.jobs), ("--timeout", args.timeout)):
        if value is not None and not 0 < value < float("inf"):
            return complain([f"{flag} {value}: must be above 0"])
    return _study(args, argv)


def _studies() -> str:
    from moe_lab.study.files import studies

    return "\n".join(f"  {name:<20} {presets.read(path).about}" for name, path in sorted(studies().items()))


def _study(args: argparse.Namespace, argv: list[str]) -> int:
    from moe_lab import hydra_app
    from moe_lab.study.files import find, key_of, read_study
    from moe_lab.verbs.train import own_configs

    own, problems = own_configs(args.config_dir)
    if problems:
        return complain(problems)
    try:
        path = find(args.study)
        study, params = read_study(path)
    except ValueError as error:
        return complain(str(error).splitlines())
    chosen = [word for word in args.overrides if key_of(word) == "scale"]
    typed = [word for word in args.overrides if word not in chosen]
    try:
        with hydra_app.open_hydra(own) as app:
            sweep, asked, checked = _expand(app, path.stem, study, params, chosen, typed, argv)
            flags = [f"--config-dir={args.config_dir}"] if args.config_dir else []
            code = run(sweep, asked, checked, flags, args)
    except hydra_app.Refused as refused:
        return complain(refused.lines)
    if code in (0, 1) and not args.dry_run:
        conclude(sweep.folder)
    return code


def conclude(folder: Path) -> None:
    """Judge and report what there is; whatever the verdicts are, the sweep's exit code is about its runs."""
    for verb in ("check", "report"):
        if importlib.util.find_spec(f"moe_lab.verbs.{verb}"):
            importlib.import_module(f"moe_lab.verbs.{verb}").main([str(folder)])


def _expand(app: Any, name: str, study: Any, params: Any, chosen: list[str], typed: list[str], argv: list[str]):
    """The sweep of a study: its folder, what Hydra made of the part that all jobs share, and each job, checked."""
    from moe_lab import hydra_app, hydra_jobs
    from moe_lab.study import grid
    from moe_lab.study.files import key_of
    from moe_lab.study.folder import Job, Sweep, command_line

    scale = grid.scale_of(study, chosen[-1].partition("=")[2] if chosen else None)
    name = name if scale == "cpu" else f"{name}-{scale}"
    places = [word for word in typed if key_of(word).split(".")[0].split("/")[0] in ("hydra", "sweep", "output_dir")]
    named = [] if any(key_of(word) == "sweep.name" for word in places) else [f"sweep.name={name}"]
    plan = hydra_app.plan(app, "train", [*named, *places], True)
    asked = hydra_jobs.ask(app, "train", plan.overrides)
    points = grid.points(asked, study, scale, params, [word for word in typed if word not in places])
    group = f"sweep.name={asked.sweep['name']}"
    checked = hydra_jobs.check(asked, [[*point.words, group] for point in points], [point.name for point in points])
    jobs = [Job(p.arm, p.seed, job.words, job.dir) for p, job in zip(points, checked, strict=True)]
    same = [(a, b) for i, a in enumerate(jobs) for b in jobs[:i] if a.dir == b.dir] if _repeats(jobs) else []
    hydra_app.refuse([f"arms {b.arm} and {a.arm} are the same run; leave one out" for a, b in same[:1]])
    return Sweep(asked.folder, asked.sweep["name"], scale, study, jobs, command_line("sweep", argv)), asked, checked


def _repeats(jobs: list[Any]) -> bool:
    return len({job.dir for job in jobs}) < len(jobs)


def run(sweep: Any, asked: Any, checked: list[Any], flags: list[str], args: argparse.Namespace | None = None) -> int:
    """Run a sweep's jobs; what was said on the command line comes before what the config says."""
    from moe_lab.reading import Damaged
    from moe_lab.run import Stop
    from moe_lab.study.sweeping import Wishes, carry_out, dry_run
    from moe_lab.verbs.train import job, no_place

    config = checked[0].cfg["sweep"]
    jobs = (args and args.jobs) or config["jobs"]
    timeout = (args and args.timeout) or config["timeout"]
    wishes = Wishes(jobs, timeout, bool(args and args.fresh), tuple(flags), job)
    try:
        go = dry_run if args and args.dry_run else carry_out
        return go(sweep, asked, checked, wishes)
    except Stop as stop:
        return complain(stop.message.splitlines(), stop.code)
    except Damaged as damaged:
        return complain([str(damaged)], 4)
    except OSError as error:  # the folder could not be made, or be written to
        return no_place(error)
