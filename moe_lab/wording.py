"""Words for what is wrong with a config: values as they were typed, the nearest right name, limits in plain English."""

import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LONGEST_SHOWN = 80  # characters of a value in a message


def place(node: Any, loc: Iterable[int | str], missing: bool) -> Iterator[str]:
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


def complaint(error: Mapping[str, Any]) -> str:
    """One of pydantic's complaints in plain words."""
    context = error.get("ctx", {})
    for limit, words in LIMITS.items():
        if limit in context:
            bound = context[limit]
            return f"must be {words} {int(bound) if bound == int(bound) else bound}"
    if error["type"] == "literal_error":
        offered = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        given = str(error["input"])
        meant = {"gpu": "cuda"}.get(given, given)
        close = difflib.get_close_matches(meant, offered, n=1)
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
    """'; did you mean x?', or what there is where that is little. `dim` and `router.dim` are near `model.dim`."""
    names = sorted(set(right))
    last = wrong.rsplit(".", 1)[-1]
    close = [name for name in names if name.rsplit(".", 1)[-1] == last]
    close = close if "." not in wrong or len(close) == 1 else []
    close = close or difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close[:3])}?"
    return f"; there are: {', '.join(names)}" if len(names) <= 20 else ""
