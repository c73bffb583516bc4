"""The jobs of a sweep: counted before they are expanded, composed and checked before the first one runs.

Hydra reads the grid (`a,b`, `range(3)`, hydra.sweeper.params); what runs the jobs is moe_lab.study, a process for each,
or one of Hydra's launchers where `hydra/launcher=` names one.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, OverrideType, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from moe_lab import config, hydra_app, naming, places
from moe_lab.hydra_app import Refused, parsed, refuse, told, unresolved

DRIVERS_OWN = ("hydra.sweep.", "hydra.sweeper.", "hydra.launcher.", "hydra.mode", "hydra.run.", "hydra/launcher")


@dataclass(frozen=True)
class Checked:
    """One job: what follows `moe-lab train`, what that composes to, and the name of its directory."""

    words: list[str]
    cfg: dict[str, Any]
    dir: str


@dataclass(frozen=True)
class Asked:
    """A sweep as a command line asks for it."""

    app: Hydra
    config_name: str
    master: DictConfig

    @property
    def folder(self) -> Path:
        return Path(str(self.master.hydra.sweep.dir))

    @property
    def sweep(self) -> Mapping[str, Any]:
        return hydra_app.unresolved(self.master)["sweep"]

    @property
    def hydra_words(self) -> list[str]:
        """What was said to Hydra and holds for each job by itself."""
        said = [str(o) for o in self.master.hydra.overrides.hydra]
        return [o for o in said if not o.lstrip("+~").startswith(DRIVERS_OWN)]

    @property
    def launcher(self) -> str:
        return str(self.master.hydra.runtime.choices["hydra/launcher"])

    @property
    def through_hydra(self) -> bool:
        """Whether one of Hydra's launchers was asked for."""
        named = any(str(o).startswith("hydra/launcher=") for o in self.master.hydra.overrides.hydra)
        return named or self.launcher != "basic"


def ask(app: Hydra, config_name: str, overrides: list[str]) -> Asked:
    """The part of a sweep that all of its jobs share. Refused where it cannot be."""
    swept = [o for o in parsed(app, overrides) if o.is_sweep_override()]
    refuse([f"{o.input_line}: a sweep has one of it" for o in swept if o.key_or_group.startswith("sweep")])
    asked = Asked(app, config_name, hydra_app.compose(app, config_name, overrides, RunMode.MULTIRUN))
    folder = told(lambda: str(asked.master.hydra.sweep.dir), app, config_name, overrides)
    refuse(places.directory("hydra.sweep.dir", folder))
    if asked.through_hydra:
        for_launcher(asked)
    return asked


def grid(asked: Asked) -> list[list[str]]:
    """Every job of `hydra.sweeper.params` and the command line, as its overrides."""
    params = OmegaConf.select(asked.master, "hydra.sweeper.params") or {}
    lines = [f"{key}={value}" for key, value in params.items()] + list(asked.master.hydra.overrides.task)
    overrides = parsed(asked.app, lines)
    count(asked, overrides)
    return [list(job) for job in itertools.chain.from_iterable(BasicSweeper.split_arguments(overrides, None))]


def count(asked: Asked, overrides: list[Override], times: int = 1) -> None:
    """Refused where these expand to too many jobs, or to none."""
    refuse([line for o in overrides if (line := _no_sweep(o))])
    many = times * math.prod(_length(override) for override in {o.get_key_element(): o for o in overrides}.values())
    most = asked.sweep["max_jobs"]
    if type(most) is int and many > most:
        said = (
            f"this sweep has {many:,} jobs; the limit is {most:,}: sweep over less at a time, or raise sweep.max_jobs"
        )
        raise Refused([said])


def values(override: Override) -> list[str]:
    """What an override sweeps over, each as it would be typed; one value where it sweeps over nothing."""
    return (
        list(override.sweep_string_iterator())
        if override.is_sweep_override()
        else [override.get_value_element_as_str()]
    )


def check(asked: Asked, jobs: list[list[str]], names: list[list[str]] | None = None) -> list[Checked]:
    """Each job composed and checked; a mistake that many share is told once. names: words for their directories.
    Jobs that come to the same config are one, again and again."""
    composed, checked = Composed(asked), dict[str, Checked]()
    found: list[Checked] = []
    mistakes: dict[str, list[str]] = {}
    for number, words in enumerate(jobs):
        try:
            cfg = composed.config(words)
            name = composed.directory(words, cfg, names[number] if names else words, number)
            if name in checked and checked[name].cfg != cfg:
                raise Refused([f"hydra.sweep.subdir={name}: several jobs would share this directory"])
            found.append(checked.setdefault(name, Checked(words, cfg, name)))
        except Refused as refused:
            for line in refused.lines:
                mistakes.setdefault(line, []).append(" ".join(names[number] if names else words))
    refuse([_where(problem, where, len(jobs)) for problem, where in mistakes.items()])
    return found


class Composed:
    """Jobs of one sweep. What Hydra composes from groups is kept and plain values are set in copies of it, and jobs
    that differ in the seed alone are checked once: a job then takes from 1 to 8 ms instead of 80."""

    def __init__(self, asked: Asked):
        self.asked, self.app, self.master = asked, asked.app, asked.master
        self.groups = set(self.app.config_loader.list_groups(""))
        self.parser = OverridesParser.create(config_loader=self.app.config_loader)
        self.bases: dict[tuple[str, ...], DictConfig] = {}
        self.seedless: dict[tuple[str, ...], dict[str, Any]] = {}
        self.named_by_us = str(unresolved(self.master.hydra.sweep)["subdir"]).startswith("${moe_lab.job_name:")
        self.there = naming.job_names(asked.folder)

    def config(self, job: list[str]) -> dict[str, Any]:
        """What a job composes to; Refused with every mistake in it."""
        seeds = [word.removeprefix("seed=") for word in job if word.startswith("seed=")]
        others = tuple(word for word in job if not word.startswith("seed="))
        plain_seed = len(seeds) == 1 and seeds[0].isdecimal() and int(seeds[0]) < 2**63
        if plain_seed and others in self.seedless:
            return self.seedless[others] | {"seed": int(seeds[0])}
        composed = told(lambda: self._compose(job), self.app, self.asked.config_name, job)
        cfg = told(lambda: naming.plain(composed), self.app, self.asked.config_name, job)
        refuse(config.check(cfg))
        if not _reads_the_seed(unresolved(composed)):
            self.seedless[others] = cfg
        return cfg

    def directory(self, job: list[str], cfg: dict[str, Any], name: list[str], number: int) -> str:
        """Where a job goes, below the sweep's folder; name: words to name it by."""
        if self.named_by_us:
            found = naming.job_name(cfg, name, self.there)
            return self.there.setdefault(found.partition("-")[0], found)
        single = self.app.config_loader.load_sweep_config(self.master, job)
        with open_dict(single), read_write(single):
            single.hydra.job.num, single.hydra.job.id = number, str(number)
        subdir = told(lambda: str(single.hydra.sweep.subdir), self.app, self.asked.config_name, job)
        refuse(places.below("hydra.sweep.subdir", subdir))
        return subdir

    def _compose(self, job: list[str]) -> DictConfig:
        overrides = self.parser.parse_overrides(job)
        plain = [
            o for o in overrides if o.type == OverrideType.CHANGE and o.key_or_group.split("/")[0] not in self.groups
        ]
        shape = tuple(str(o.input_line) for o in overrides if o not in plain)
        if shape not in self.bases:
            self.bases[shape] = self.app.config_loader.load_sweep_config(self.master, list(shape))
        cfg = copy.deepcopy(self.bases[shape])
        for o in plain:
            OmegaConf.update(cfg, o.key_or_group, o.value(), merge=True)
        return cfg


def _reads_the_seed(node: Any) -> bool:
    """Whether an interpolation of the job's part of a config may depend on the seed."""
    if isinstance(node, Mapping):
        return any(_reads_the_seed(value) for key, value in node.items() if key != "hydra")
    if isinstance(node, list):
        return any(map(_reads_the_seed, node))
    return isinstance(node, str) and "${" in node and "seed" in node


def for_launcher(asked: Asked) -> DictConfig:
    """What a launcher is told. Refused where a word of it has two lines: submitit writes a script for Slurm."""
    said = [str(o) for o in asked.master.hydra.overrides.hydra]
    said.append(f"hydra.sweep.dir={quoted(str(asked.folder))}")  # it may follow from the job's part, as sweep.name
    cfg = asked.app.compose_config(asked.config_name, said, RunMode.MULTIRUN, with_log_configuration=True)
    options = told(lambda: OmegaConf.to_container(cfg.hydra.launcher, resolve=True), asked.app, asked.config_name, said)
    refuse([f"hydra.launcher: {word!r} has more than one line" for word in _words(options) if not word.isprintable()])
    return cfg


def _words(node: Any) -> Iterator[str]:
    """All keys and values."""
    if isinstance(node, dict):
        node = [*node, *node.values()]
    if isinstance(node, list):
        for one in node:
            yield from _words(one)
    else:
        yield str(node)


def launch(asked: Asked, jobs: list[Checked], task: TaskFunction) -> list[JobReturn]:
    """Hand the jobs to Hydra's launcher, which runs `task` for each in its directory below the sweep's folder."""
    cfg = for_launcher(asked)
    context = HydraContext(config_loader=asked.app.config_loader, callbacks=Callbacks(cfg))
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=cfg)
    words = [[*job.words, f"hydra.sweep.subdir={quoted(job.dir)}"] for job in jobs]
    return list(launcher.launch(words, initial_job_idx=0))


def quoted(text: str) -> str:
    """Text as Hydra's grammar reads it back."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _no_sweep(override: Override) -> str | None:
    """What is wrong with a sweep over one key."""
    value = override.value()
    if override.is_sweep_override() and not override.is_discrete_sweep():
        return f"{override.input_line}: has no end; sweep over a,b,c or range(start,stop,step)"
    if isinstance(value, RangeSweep) and not value.step:
        return f"{override.input_line}: a range needs a step other than 0"
    return f"{override.input_line}: there is nothing in it to sweep over" if not _length(override) else None


def _length(override: Override) -> int:
    value = override.value()
    if isinstance(value, Glob):
        return sum(1 for _ in override.sweep_string_iterator())
    if isinstance(value, RangeSweep):
        assert value.start is not None and value.stop is not None
        return max(0, math.ceil((value.stop - value.start) / value.step))
    return len(value.list) if isinstance(value, ChoiceSweep) else 1


def _where(problem: str, jobs: list[str], many: int) -> str:
    if len(jobs) == many:
        return problem
    more = f" and {len(jobs) - 1} more of {many} jobs" if len(jobs) > 1 else ""
    return f"{problem}  (job {jobs[0]}{more})"
