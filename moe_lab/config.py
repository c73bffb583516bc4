"""Configs are data: the keyword-only parameters of a registered class are the options that a config may set.

`@option("router", "topk")` registers a class. `check` holds a composed config against the signatures (types and
ranges by pydantic, unknown keys with the nearest right name, combinations by each class's `conflicts`) and tells
every mistake at once; `build` constructs. Nothing named in a config is ever imported or called by its path.
"""

import difflib
import importlib
import inspect
import os
import pkgutil
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from moe_lab.secrecy import secrets_in

LONGEST_SHOWN = 80  # characters of a value in a message
LARGEST = 2**63  # whole numbers stay below: no tensor, file or counter takes more
Config = Mapping[str, Any]
C = TypeVar("C", bound=type)

# Where each group's options are declared: a package (every module in it) or a module.
HOMES = {
    "router": "moe_lab.routers",
    "experts": "moe_lab.model.experts",
    "balance": "moe_lab.balance",
    "explore": "moe_lab.explore",
    "schedule": "moe_lab.schedules",
    "dataset": "moe_lab.datasets",
    "model": "moe_lab.model.transformer",
    "objective": "moe_lab.objectives",
    "optim": "moe_lab.optim",
    "logger": "moe_lab.sinks",
    "root": "moe_lab.settings",
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LISTS = {"balance": "balance", "explore": "explore", "logger": ""}  # groups of lists, and the node where each lands
_registry: dict[str, dict[str, type]] = {group: {} for group in HOMES}


def option(group: str, name: str):
    """Class decorator: registers the class in `group` under `name`; its keyword-only parameters are its options."""

    def register(cls: C) -> C:
        known = _registry[group].setdefault(name, cls)
        assert known is cls or known.__qualname__ == cls.__qualname__, f"{group}={name} is registered twice"
        return cls

    return register


@cache
def discover() -> None:
    """Import every module that declares options, and those named in MOE_LAB_PLUGINS (comma-separated)."""
    for home in HOMES.values():
        module = importlib.import_module(home)
        for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
            importlib.import_module(f"{home}.{found.name}")
    for plugin in filter(None, os.environ.get("MOE_LAB_PLUGINS", "").split(",")):
        try:
            importlib.import_module(plugin.strip())
        except ModuleNotFoundError as error:
            if error.name != plugin.strip():
                raise
            raise ValueError(f"MOE_LAB_PLUGINS={plugin}: no such module; is its folder in PYTHONPATH?") from None


def registered(group: str) -> Mapping[str, type]:
    """The classes of a group by name."""
    discover()
    return _registry[group]


@cache
def schema(cls: type) -> type[BaseModel]:
    """The keyword-only parameters of `cls` as a pydantic model that refuses unknown keys."""
    strict = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)
    return create_model(cls.__name__, __config__=strict, **_options(cls))


def _options(cls: type) -> dict[str, Any]:
    """Type and default of each option; those of the base class as well where `__init__` hands on `**common`."""
    init = next(base for base in cls.__mro__ if "__init__" in vars(base))
    if init is object:
        return {}
    hints = typing.get_type_hints(init.__init__, include_extras=True)
    parameters = inspect.signature(init.__init__).parameters.values()
    own = {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    handed_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return (_options(init.__mro__[1]) if handed_on else {}) | own


def build(group: str, node: Config, *runtime: Any) -> Any:
    """Construct the option that `node` names, from positional runtime arguments and the node's options."""
    cls = registered(group)[node["name"]]
    values = schema(cls).model_validate({k: v for k, v in node.items() if k != "name"})
    return cls(*runtime, **{name: getattr(values, name) for name in schema(cls).model_fields})


def nodes(cfg: Config) -> Iterator[tuple[str, str, Config]]:
    """(path, group, node) for every option of a composed config; root keys come last as ("", "root", ...)."""
    rest = dict(cfg)
    for group in HOMES:
        if LISTS.get(group):
            chosen = rest.pop(group, None) or {}
            if isinstance(chosen, Mapping):
                yield from ((f"{group}.{name}", group, node) for name, node in chosen.items())
            else:
                yield group, group, {"name": chosen}
        elif group == "logger":
            for name in registered(group):
                if name in rest:
                    yield name, group, rest.pop(name)
        elif group == "root":
            yield "", group, {"name": "train", **rest}
        else:
            yield group, group, rest.pop(group, None) or {}


def check(cfg: Config) -> list[str]:
    """Every mistake in a composed config (plain containers), one line each; empty when it can run."""
    try:
        discover()
    except ValueError as error:
        return [str(error)]
    if problems := [*_targets(cfg, ""), *unfit_for_a_record(cfg, "")]:
        return problems
    for path, group, node in nodes(cfg):
        problems += _node_problems(path, group, node)
    if not problems:
        whole = complete(cfg)
        for _, group, node in nodes(whole):
            conflicts = getattr(registered(group)[node["name"]], "conflicts", None)
            problems += conflicts(node, whole) if conflicts else []
    return problems


def complete(cfg: Config) -> dict[str, Any]:
    """The same config with the defaults of options that it leaves out: a preset of one's own may be short."""
    whole = dict(cfg) | {group: dict(cfg.get(group) or {}) for group in LISTS if LISTS[group]}
    for path, group, node in nodes(cfg):
        fields = schema(registered(group)[node["name"]]).model_fields
        full = {name: field.default for name, field in fields.items() if not field.is_required()} | dict(node)
        if LISTS.get(group):
            whole[group][path.removeprefix(f"{group}.")] = full
        elif path:
            whole[path] = full
    return whole


def _node_problems(path: str, group: str, node: Config) -> Iterator[str]:
    if node and not isinstance(node, Mapping):
        yield f"{path}={shown(node)}: must be a mapping of keys; {group}=NAME chooses one"
        return
    if not node or "name" not in node:
        yield f"{path or group}: nothing chosen; try {path or group}={next(iter(registered(group)))}"
        return
    known = registered(group)
    if not isinstance(node["name"], str) or node["name"] not in known:
        right = nearest(str(node["name"]), known)
        yield f"{path}.name={shown(node['name'])}: no such {group}{right} (your own: MOE_LAB_PLUGINS=module)"
        return
    options = {key: value for key, value in node.items() if key not in ("name", "_target_")}
    model = schema(known[node["name"]])
    if huge := list(_huge(options, path)):
        yield from huge
        return
    try:
        yield from _disguised(options, model.model_validate(options), path)
    except ValidationError as error:
        siblings = [".".join(filter(None, [path, name])) for name in (*model.model_fields, *([] if path else HOMES))]
        said: dict[str, list[str]] = {}  # a union reports once per member: one line for each place
        for e in error.errors(include_url=False):
            where = ".".join(filter(None, [path, *_typed(options, e["loc"], e["type"] == "missing")]))
            if e["type"] == "extra_forbidden":
                said[where] = [f"{where}: no such key{nearest(where, siblings)}"]
            elif e["type"] == "missing":
                said[where] = [f"{where}: missing; give it a value"]
            else:
                said.setdefault(where, [f"{where}={shown(e['input'])}:"]).append(wording(e))
        for first, *more in said.values():
            yield f"{first} {' or '.join(dict.fromkeys(more)).replace(' or must be ', ' or ')}".rstrip()


def _huge(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, Mapping | list):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _huge(value, ".".join(filter(None, [path, str(key)])))
    elif isinstance(node, int) and abs(node) >= LARGEST:
        yield f"{path}={shown(node)}: must be below {LARGEST}"


def _disguised(given: Any, taken: Any, path: str) -> Iterator[str]:
    """Numbers written as true or as text: pydantic takes `steps=true` for 1, and arithmetic on text fails later."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            inner = getattr(taken, key, None) if isinstance(taken, BaseModel) else None
            yield from _disguised(value, inner, ".".join(filter(None, [path, key])))
    elif isinstance(given, bool | str) and type(taken) in (int, float, bool) and type(given) is not type(taken):
        kind = {int: "int", float: "float", bool: "bool"}[type(taken)]
        yield f"{path}={shown(given)}: {KINDS[kind]}, this is {'text' if isinstance(given, str) else 'true or false'}"


def _typed(node: Any, loc: Iterable[int | str], missing: bool) -> Iterator[str]:
    """The part of pydantic's location that stands in the config: it puts names of union members in between."""
    for part in loc:
        if (isinstance(node, Mapping) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            node = typing.cast(Any, node)[part]
        elif not missing:
            continue
        yield str(part)


KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
    "list": "must be a list, e.g. [a,b]",
    "sequence": "must be a list, e.g. [a,b]",
    "model": "must be a mapping of keys",
    "dict": "must be a mapping of keys",
    "none": "must be null",
    "finite": "must be a finite number",
}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def wording(error: Mapping[str, Any]) -> str:
    """One of pydantic's complaints in plain words."""
    context = error.get("ctx", {})
    for limit, words in LIMITS.items():
        if limit in context:
            bound = context[limit]
            return f"must be {words} {int(bound) if bound == int(bound) else bound}"
    if error["type"] == "literal_error":
        offered = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        close = difflib.get_close_matches(str(error["input"]), offered, n=1)
        return f"must be {' | '.join(offered)}" + (f"; did you mean {close[0]}?" if close else "")
    if error["type"] == "string_too_short":
        return "must not be empty"
    if error["type"] == "string_pattern_mismatch":
        return f"must match {context['pattern']}"
    message = error["msg"].removeprefix("Value error, ")
    return KINDS.get(error["type"].split("_")[0], f"{message[0].lower()}{message[1:]}")


def shown(value: Any) -> str:
    """A value as it would be typed, its beginning where it is long."""
    whole = _typed_as(value)
    return whole if len(whole) <= LONGEST_SHOWN else f"{whole[: LONGEST_SHOWN - 3]}..."


def _typed_as(value: Any) -> str:
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{k}: {shown(v)}' for k, v in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def nearest(wrong: str, right: Iterable[str]) -> str:
    """'; did you mean x?', or what there is where that is little. A bare `dim` is near `model.dim`."""
    names = sorted(set(right))
    last = wrong.rsplit(".", 1)[-1]
    close = [name for name in names if name.rsplit(".", 1)[-1] == last] if "." not in wrong else []
    close = close or difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close[:3])}?"
    return f"; there are: {', '.join(names)}" if len(names) <= 20 else ""


def unfit_for_a_record(node: Any, path: str) -> list[str]:
    """Secrets and text that steers a terminal: configs are written down, shown, and sent to W&B."""
    return [*secrets_in(node, path), *_controls(node, path)]


def _controls(node: Any, path: str) -> Iterator[str]:
    """Control characters but newline and tab, halves of characters, and what reverses the reading direction."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _controls(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _controls(value, f"{path}.{i}")
    elif isinstance(node, str) and (found := CONTROL.search(node)):
        yield f"{path}: holds the control character U+{ord(found[0]):04X}"


def _targets(node: Any, path: str) -> Iterator[str]:
    """A `_target_` asks for code to be run by its path; there is no place where it is honoured."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield f"{where}: configs are data here; options are chosen by name, e.g. router=topk"
            yield from _targets(value, where)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _targets(value, f"{path}.{i}")
