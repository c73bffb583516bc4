"""Hydra behind `moe-lab train`: compose and check everything first, then let Hydra run it.

Hydra makes the run directory, and builds whatever its own part of the config names, before any code of ours is
asked. So the same config is composed here beforehand with Hydra's own loader: its `hydra` part is held against the
few things that may stand there, its job part against the schema; hydra_jobs does so for each job of a sweep.
"""

import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
import hydra.utils
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from moe_lab import config, mistakes, naming, places, presets

T = TypeVar("T")
# What may be built for Hydra itself. Everything else with a `_target_` is refused before Hydra sees it.
TARGETS = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
}
# How those options of a launcher begin that run commands, install packages, set the environment or lead to other code;
# of sbatch a beginning is enough.
RUNS_CODE = ("setup", "teardown", "srun_args", "export", "ch", "conta", "runtime_env")
HANDLERS = (
    "logging.NullHandler",
    "logging.StreamHandler",
    "logging.FileHandler",
    "moe_lab.sinks.messages.TerminalHandler",
    "moe_lab.sinks.messages.LogFile",
    "moe_lab.sinks.messages.Formatter",
)


class Refused(Exception):
    """The config cannot run; `lines` tell every mistake."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


@dataclass
class Plan:
    """What a command line asks for, composed and checked; of a sweep the part that its jobs share."""

    overrides: list[str]  # for Hydra, its mode included
    multirun: bool


@contextmanager
def open_hydra(own: Path | None) -> Iterator[Hydra]:
    """Hydra over conf/ and the user's own config directory."""
    if hydra.__version__ < "1.4":
        version.setbase("1.3")
    naming.register_resolvers()
    search_path = create_config_search_path(str(presets.conf_dir()))
    if own is not None:
        last = SearchPathQuery(provider="schema", path=None)  # where Hydra's own --config-dir stands
        search_path.prepend(provider="command-line", path=f"file://{own.absolute()}", anchor=last)
    GlobalHydra.instance().clear()
    allow = getattr(hydra.utils, "execution_whitelist", None)  # from Hydra 1.4 on
    try:
        with allow([*TARGETS, *HANDLERS]) if allow else nullcontext():
            yield Hydra.create_main_hydra2(task_name="train", config_search_path=search_path)
    finally:
        GlobalHydra.instance().clear()


def compose(app: Hydra, config_name: str, overrides: list[str], mode: RunMode = RunMode.RUN, **how: bool) -> DictConfig:
    """The composed config. Refused with every mistake that keeps it from being composed."""
    loader = app.config_loader
    return told(lambda: loader.load_configuration(config_name, overrides, mode, **how), app, config_name, overrides)


def compose_one(app: Hydra, config_name: str, overrides: list[str]) -> DictConfig:
    """What --cfg and --info show, which is one job, with -m as well."""
    given = told(lambda: parsed(app, overrides), app, config_name, overrides)
    refuse(
        [
            f"{o.input_line}: several values, but what is shown is one job: give a single value with --cfg or --info"
            for o in given
            if o.is_sweep_override()
        ]
    )
    cfg = compose(app, config_name, overrides)
    refuse(_unfit(given))
    job = {key: value for key, value in unresolved(cfg).items() if key != "hydra"}
    refuse(config.unfit_for_a_record(job, ""))
    return cfg


def told(load: Callable[[], T], app: Hydra, config_name: str, overrides: list[str]) -> T:
    try:
        return load()
    except Exception as error:  # whatever Hydra, OmegaConf, yaml or the parser raise: the config cannot be read
        raise Refused(mistakes.explain(error, app.config_loader, config_name, overrides)) from error


def plan(app: Hydra, config_name: str, overrides: list[str], multirun: bool) -> Plan:
    """Compose and check all that is asked for. Raises Refused with every mistake that was found."""
    refuse(told(lambda: _unfit(parsed(app, overrides)), app, config_name, overrides))
    swept = _with_groups(app, overrides)
    master = compose(app, config_name, swept, RunMode.MULTIRUN, validate_sweep_overrides=False)
    hydra_part = unresolved(master.hydra)
    refuse(list(forbidden(hydra_part)))
    refuse(config.unfit_for_a_record(hydra_part, "hydra") or list(places.joined(hydra_part)))
    multirun = multirun or master.hydra.mode == RunMode.MULTIRUN
    asked = [o for o in (swept if multirun else overrides) if not o.startswith("hydra.mode=")]
    asked.append(f"hydra.mode={'MULTIRUN' if multirun else 'RUN'}")
    if not multirun:
        cfg = compose(app, config_name, asked)
        refuse(config.check(told(lambda: naming.plain(cfg), app, config_name, asked)))
        refuse(_taken(told(lambda: str(cfg.hydra.run.dir), app, config_name, asked)))
    return Plan(asked, multirun)


def _with_groups(app: Hydra, overrides: list[str]) -> list[str]:
    """`router=topk,switch router.k=1`: Hydra would set router.k in the default router first, which need not have it.
    As a sweep over one value, it is set together with each router."""
    given = parsed(app, overrides)
    swept = {o.key_or_group for o in given if o.is_sweep_override() and "." not in o.key_or_group}
    told = []
    for o in given:
        key, _, value = str(o.input_line).partition("=")
        inside = o.type == OverrideType.CHANGE and "." in key and key.split(".")[0] in swept
        told.append(f"{key}=choice({value})" if inside and not o.is_sweep_override() else str(o.input_line))
    return told


def parsed(app: Hydra, overrides: list[str]) -> list[Override]:
    return OverridesParser.create(config_loader=app.config_loader).parse_overrides(overrides)


def _unfit(overrides: list[Override]) -> list[str]:
    """Overrides are written down as they were given, also where a later one replaces them."""
    values = [
        (o.key_or_group, str(o.input_line).partition("=")[2] if o.is_sweep_override() else o.value()) for o in overrides
    ]
    return [problem for key, value in values for problem in config.unfit_for_a_record({key: value}, "")]


def refuse(problems: list[str]) -> None:
    if problems:
        raise Refused(problems)


def _taken(run_dir: str) -> list[str]:
    """A run directory of the user's own choice must be new, or hold a run."""
    if problems := places.named("hydra.run.dir", run_dir):
        return problems
    folder = Path(run_dir)
    # .lock: killed before it had a status. job.json: a sweep is about to start it.
    begun = any((folder / name).exists() for name in ("status.json", ".lock", "job.json"))
    if folder.is_dir() and any(folder.iterdir()) and not begun:
        return [f"hydra.run.dir={folder}: is not empty and holds no run; choose a new directory"]
    return places.directory("hydra.run.dir", str(folder))


def unresolved(cfg: DictConfig) -> dict[str, Any]:
    return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


def forbidden(node: Any, path: str = "hydra") -> Iterator[str]:
    """What stands in the `hydra` part and would run code or change the process by its name alone."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        where = f"{path}.{key}"
        if key == "_target_" and value not in TARGETS:
            yield f"{where}={value}: not allowed; configs are data, and Hydra may build only its own launchers"
        elif key in ("()", "class") and "logging" in path and value not in HANDLERS:
            yield f"{where}={value}: not allowed; log handlers are {', '.join(HANDLERS)}"
        elif where == "hydra.job.env_set" and value:
            yield f"{where}: not allowed; set environment variables in your shell"
        elif path.startswith("hydra.launcher") and str(key).startswith(RUNS_CODE) and value:
            yield f"{where}: not allowed; configs are data: prepare your shell, whose environment the jobs inherit"
        else:
            yield from forbidden(value, where)


def hydra_command(config_name: str, own: Path | None, argv: list[str]) -> None:
    """Hydra's own --cfg, --info and --hydra-help, unchanged."""
    old = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}
    naming.register_resolvers()
    main = hydra.main(config_path=str(presets.conf_dir()), config_name=config_name, **old)
    extra = ["--config-dir", str(own)] if own is not None else []
    sys.argv = ["moe-lab train", *argv, *extra]
    main(_nothing)()


def _nothing(cfg: DictConfig) -> None:
    raise AssertionError("this command runs no job")
