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
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

Config = Mapping[str, Any]
C = TypeVar("C", bound=type)

# Where each group's options are declared: a package (every module in it) or a module.
HOMES = {
    "router": "moe_lab.routers",
    "experts": "moe_lab.model.experts",
    "balance": "moe_lab.balance",
    "schedule": "moe_lab.schedules",
    "dataset": "moe_lab.datasets",
    "model": "moe_lab.model.transformer",
    "objective": "moe_lab.objectives",
    "optim": "moe_lab.optim",
    "logger": "moe_lab.sinks",
    "root": "moe_lab.settings",
}
LISTS = {"balance": "balance", "logger": ""}  # groups that take a list, and the node under which it lands
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
        importlib.import_module(plugin.strip())


def registered(group: str) -> Mapping[str, type]:
    """The classes of a group by name."""
    discover()
    return _registry[group]


@cache
def schema(cls: type) -> type[BaseModel]:
    """The keyword-only parameters of `cls` as a pydantic model that refuses unknown keys."""
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    fields: dict[str, Any] = {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default)
        for p in inspect.signature(cls).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model(cls.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


def build(group: str, node: Config, *runtime: Any) -> Any:
    """Construct the option that `node` names, from positional runtime arguments and the node's options."""
    cls = registered(group)[node["name"]]
    values = schema(cls).model_validate({k: v for k, v in node.items() if k != "name"})
    return cls(*runtime, **{name: getattr(values, name) for name in schema(cls).model_fields})


def nodes(cfg: Config) -> Iterator[tuple[str, str, Config]]:
    """(path, group, node) for every option of a composed config; root keys come last as ("", "root", ...)."""
    rest = dict(cfg)
    for group in HOMES:
        if group == "balance":
            for name, node in (rest.pop("balance", None) or {}).items():
                yield f"balance.{name}", group, node
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
    problems = list(_targets(cfg, ""))
    found = list(nodes(cfg))
    for path, group, node in found:
        problems += _node_problems(path, group, node)
    if not problems:
        for _, group, node in found:
            conflicts = getattr(registered(group)[node["name"]], "conflicts", None)
            problems += conflicts(node, cfg) if conflicts else []
    return problems


def _node_problems(path: str, group: str, node: Config) -> Iterator[str]:
    if not isinstance(node, Mapping) or "name" not in node:
        yield f"{path or group}: nothing chosen; try {path or group}={next(iter(registered(group)))}"
        return
    known = registered(group)
    if node["name"] not in known:
        yield f"{path}.name={node['name']}: no such {group}{nearest(str(node['name']), known)}"
        return
    model = schema(known[node["name"]])
    try:
        model.model_validate({k: v for k, v in node.items() if k != "name"})
    except ValidationError as error:
        seen: set[str] = set()
        for e in error.errors():
            # A union reports once per member; the path up to the first key that is no field is what the user typed.
            parts = [str(part) for part in e["loc"] if not str(part).startswith(("function-", "constrained-"))]
            where = ".".join(filter(None, [path, *parts]))
            if e["type"] == "extra_forbidden":
                siblings = [".".join(filter(None, [path, name])) for name in model.model_fields]
                line = f"{where}: no such key{nearest(where, siblings)}"
            elif e["type"] == "missing":
                line = f"{where}: missing; give it a value"
            else:
                message = e["msg"].removeprefix("Value error, ")
                line = f"{where}={e['input']!r}: {message[0].lower()}{message[1:]}"
            if where not in seen:
                seen.add(where)
                yield line


def nearest(wrong: str, right: typing.Iterable[str]) -> str:
    """'; did you mean x?' or the list of what there is."""
    names = sorted(right)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names)}"


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
