"""Hydra's composition errors in one line each: what is wrong, where, and the nearest right name."""

import re
from collections.abc import Iterable
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    UnsupportedInterpolationType,
)

from moe_lab import config, presets
from moe_lab.config import nearest
from moe_lab.secrecy import redact

HIDDEN = (".name", "_target_")
LAUNCHERS = " (moe-lab[slurm] has submitit's, moe-lab[ray] Ray's)"


def explain(error: BaseException, loader: ConfigLoader, config_name: str, overrides: list[str]) -> list[str]:
    """One line for each mistake behind a composition error, whatever part of Hydra raised it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if unreadable := [o for o in overrides if o.lstrip("+~").startswith("=") or not _reads(o, loader)]:
        return [_unreadable(o) for o in unreadable]
    for e in chain:
        if isinstance(e, OverrideParseException):
            return [_unreadable(e.override)]
        if isinstance(e, yaml.YAMLError):
            return [_bad_yaml(e)]
        if isinstance(e, UnicodeDecodeError):
            return [f"a config file is not UTF-8 text ({e.reason} at byte {e.start})"]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file == config_name:
        return [f"--config-name {config_name}: no such file in the config directories"]
    return _bad_overrides(loader, config_name, overrides) or [_said(error, chain, loader, config_name, overrides)]


def _reads(override: str, loader: ConfigLoader) -> bool:
    try:
        OverridesParser.create(config_loader=loader).parse_override(override)
    except Exception:  # beside its own error the parser lets through those of Python: too deep, too many digits
        return False
    return True


def _unreadable(override: str) -> str:
    override = config.shown(redact(override))
    if "=" not in override.lstrip("=") or override.startswith("="):
        return f"{override}: not understood; write key=value, e.g. router=topk"
    if "~/" in override:  # quoted, it would be a folder of that name
        return f"{override}: ~ is not expanded here; write $HOME, or the path in full"
    return f"{override}: cannot be read; quote a value with special characters: 'key=\"a, b\"'"


def _bad_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}:{mark.line + 1}: " if mark else ""
    problem = getattr(error, "problem", None)
    said = f"{error.context}, {problem}" if problem and problem.startswith("but ") else problem  # pyright: ignore
    return f"{where}not valid yaml: {said or error}"


def _bad_overrides(loader: ConfigLoader, config_name: str, overrides: list[str]) -> list[str]:
    """Hold each override against what there is: groups, their options, and the keys of the config without it."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    groups = loader.list_groups("")
    lines = {id(o): line for o in parsed if (line := _bad_choice(o, loader, groups))}
    chosen = [o for o in parsed if _group_of(o) in groups and id(o) not in lines]
    try:
        lines_of_chosen = [str(o.input_line) for o in chosen]
        base = loader.load_configuration(config_name, lines_of_chosen, RunMode.MULTIRUN, validate_sweep_overrides=False)
    except Exception:
        return list(lines.values())
    keys = list(_keys(OmegaConf.to_container(base, resolve=False)))
    for o in parsed:
        if o in chosen or id(o) in lines:
            continue
        key = o.key_or_group
        if key not in keys and (o.is_delete() or not (o.is_add() or o.is_force_add())):
            lines[id(o)] = _no_such_key(key, keys, groups)
    return list(lines.values())


def _no_such_key(key: str, keys: Iterable[str], groups: list[str]) -> str:
    if key.endswith("_target_"):
        return f"{key}: configs are data here; options are chosen by name, e.g. router=topk"
    having = {f"{g.name}={p.name}" for g in presets.groups().values() for p in g.presets.values() if p.has(key)}
    if having:
        return f"{key}: not a key of what is chosen here; it belongs to {' | '.join(sorted(having))}"
    offered = [k for k in keys if k.startswith("hydra.") == key.startswith("hydra.") and not k.endswith(HIDDEN)]
    hint = nearest(key, [*offered, *groups])
    return f"{key}: no such key or group{hint or '; see moe-lab train --help and moe-lab list'}"


def _group_of(override: Override) -> str:
    return override.key_or_group.split("/")[0]


def _bad_choice(override: Override, loader: ConfigLoader, groups: Iterable[str]) -> str | None:
    group = override.key_or_group
    if _group_of(override) not in groups:
        return None
    options = loader.get_group_options(group)
    if group == "hydra/launcher" and override.value() not in options:
        return f"{group}={override.value()}: not installed{LAUNCHERS}; there are: {', '.join(options)}"
    if not options:
        return f"{group}: no such group{nearest(group, loader.list_groups(_group_of(override)))}"
    value = override.value()
    if isinstance(value, ChoiceSweep):
        value = [choice.text if isinstance(choice, QuotedString) else choice for choice in value.list]
    for choice in value if isinstance(value, list) else [value]:
        if not isinstance(choice, dict | list) and str(choice) not in options:
            empty = group in config.LISTS and str(choice).lower() in ("none", "null", "off", "no", "false")
            hint = f"; write {group}=[] for none" if empty else nearest(str(choice), options)
            return f"{group}={config.shown(choice)}: no such option{hint}"
    return None


def _keys(node: Any, path: str = "") -> Iterable[str]:
    for key, value in node.items():
        where = f"{path}.{key}" if path else str(key)
        yield where
        if isinstance(value, dict):
            yield from _keys(value, where)


def _said(
    error: BaseException, chain: list[BaseException], loader: ConfigLoader, config_name: str, overrides: list[str]
) -> str:
    """The error's own words, its cause's where they say more, on one line with the override behind it."""
    for e in chain:
        where = getattr(e, "full_key", None)
        if isinstance(e, MissingMandatoryValue):
            return f"{where}: missing (???); give it a value"
        if isinstance(e, InterpolationKeyError | UnsupportedInterpolationType | InterpolationResolutionError):
            return f"{where}: {_first_line(e).rpartition('raised while resolving interpolation: ')[2]}"
    several = re.match(r"Ambiguous value for argument '(.*)'", str(error))
    if several:
        return f"{several[1]}: several values; add -m to run each of them, or write [a,b] for a list"
    needs = re.match(r"Sweep parameters '(.*)' requires", str(error))
    if needs:
        return f"{needs[1]}: several values; add -m to run each of them"
    words = " ".join(dict.fromkeys(filter(None, (_first_line(e) for e in chain[:2]))))
    culprit = _culprit(loader, config_name, overrides)
    return ": ".join(filter(None, [culprit and config.shown(culprit), words]))


def _culprit(loader: ConfigLoader, config_name: str, overrides: list[str]) -> str | None:
    """The override without which the rest can be composed."""
    for o in overrides:
        try:
            rest = [other for other in overrides if other is not o]
            loader.load_configuration(config_name, rest, RunMode.MULTIRUN, validate_sweep_overrides=False)
            return o
        except Exception:
            continue
    return None


def _first_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep, or it leads back to itself"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
