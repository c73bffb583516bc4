"""Hydra's composition errors in one line each: what is wrong, where, and the nearest right name."""

import re
from collections.abc import Iterable

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from moe_lab.config import nearest

COMPOSITION = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, RecursionError)


def explain(error: BaseException, loader: ConfigLoader, config_name: str, overrides: list[str]) -> list[str]:
    """One line for each mistake behind a composition error, whatever part of Hydra raised it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for e in chain:
        if isinstance(e, OverrideParseException):
            return [_unreadable(e.override)]
        if isinstance(e, yaml.YAMLError):
            return [_bad_yaml(e)]
        if isinstance(e, UnicodeDecodeError):
            return [f"a config file is not UTF-8 text ({e.reason} at byte {e.start})"]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file == config_name:
        return [f"--config-name {config_name}: no such file in the config directories"]
    return _bad_overrides(loader, config_name, overrides) or [_said(error, chain)]


def _unreadable(override: str) -> str:
    if "=" not in override:
        return f"{override}: not understood; write key=value, e.g. router=topk"
    return f"{override}: cannot be read; quote a value with special characters: 'key=\"a, b\"'"


def _bad_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}:{mark.line + 1}: " if mark else ""
    return f"{where}not valid yaml: {getattr(error, 'problem', None) or error}"


def _bad_overrides(loader: ConfigLoader, config_name: str, overrides: list[str]) -> list[str]:
    """Hold each override against what there is: groups, their options, and the keys of the config without it."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    groups = loader.list_groups("")
    lines = {id(o): line for o in parsed if (line := _bad_choice(o, loader, groups))}
    chosen = [o for o in parsed if _group_of(o) in groups and id(o) not in lines]
    try:
        lines_of_chosen = [str(o.input_line) for o in chosen]
        base = loader.load_configuration(config_name, lines_of_chosen, RunMode.MULTIRUN, validate_sweep_overrides=False)
    except COMPOSITION:
        return list(lines.values())
    keys = list(_keys(base))
    for o in parsed:
        if o in chosen or id(o) in lines:
            continue
        key = o.key_or_group
        missing = OmegaConf.select(base, key, throw_on_missing=False) is None and key not in keys
        if missing and (o.is_delete() or not (o.is_add() or o.is_force_add())):
            lines[id(o)] = f"{key}: no such key or group{nearest(key, [*keys, *groups])}"
    return list(lines.values())


def _group_of(override: Override) -> str:
    return override.key_or_group.split("/")[0]


def _bad_choice(override: Override, loader: ConfigLoader, groups: Iterable[str]) -> str | None:
    group = override.key_or_group
    if _group_of(override) not in groups:
        return None
    options = loader.get_group_options(group)
    if not options:
        return f"{group}: no such group{nearest(group, loader.list_groups(_group_of(override)))}"
    value = override.value()
    for choice in value if isinstance(value, list) else [value]:
        if isinstance(choice, str) and choice not in options:
            return f"{group}={choice}: no such option{nearest(choice, options)}"
    return None


def _keys(node: DictConfig, path: str = "") -> Iterable[str]:
    for key in node:
        where = f"{path}.{key}" if path else str(key)
        yield where
        if OmegaConf.is_dict(inner := node._get_node(key)) and not inner._is_missing() and not inner._is_none():
            yield from _keys(inner, where)


def _said(error: BaseException, chain: list[BaseException]) -> str:
    """The error's own words, its cause's where they say more, on one line."""
    for e in chain:
        where = getattr(e, "full_key", None)
        if isinstance(e, MissingMandatoryValue):
            return f"{where}: missing (???); give it a value"
        if isinstance(e, InterpolationKeyError | UnsupportedInterpolationType | InterpolationResolutionError):
            return f"{where}: {_first_line(e)}"
    several = re.match(r"Ambiguous value for argument '(.*)'", str(error))
    if several:
        return f"{several[1]}: several values; add -m to run each of them, or write [a,b] for a list"
    needs = re.match(r"Sweep parameters '(.*)' requires", str(error))
    if needs:
        return f"{needs[1]}: several values; add -m to run each of them"
    return " ".join(dict.fromkeys(filter(None, (_first_line(e) for e in chain[:2]))))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
