"""What looks like a secret: by the name of its key, by its shape, or because the environment holds it.

Configs are written down with every run, so a config that holds a secret is refused; whatever is said or logged
passes through `hide`.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "[redacted]"
WHY = "configs are written down with every run; leave it to the environment of the program that needs it"
SHORTEST = 8  # a shorter value of the environment stands in many texts by chance

_NAME = re.compile(
    r"secret|passw|passphrase|credential|(api|access|private)_?key"
    r"|(^|[^a-z])(key|token|auth|pass|pwd|pat|bearer)(_?\d+)?$"
)
# scheme://user@, scheme://user:password@ (also with a / or @ in the password), and ?token=... behind a path
_URL = re.compile(r"(?<=://)(?:[^/@\s]{1,999}|[^/\s:@]{0,999}:(?!\d+/)[^\s]{0,999})@")
_PASSWORD = re.compile(r"://[^/\s:@]*:(?!\d+/)([^\s]+)@")
_QUERY = re.compile(r"([?&]([\w.-]+)=)([^&\s\"']+)")
_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|sk-(?=[\w-]{0,200}?(?=[A-Za-z]{0,200}\d)[A-Za-z0-9]{16})[\w-]{20,}"  # no sk-learn-of-2024
    r"|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|npm_[A-Za-z0-9]{36}|pypi-AgEI[\w-]+"
    r"|wandb_v\d_\w{20,}|local-[0-9a-f]{40}|eyJ[\w-]{8,2000}\.eyJ[\w-]{8,2000}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?<=hooks\.slack\.com/services/)[\w/]+"
)
_HEADER = re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer|token)\s+)([\w.~+/=-]+)")
_VALUE = r"(\"[^\"]*\"|'[^']*'|[^\s,;}\]]+)"
# Each name from its first letter on only: a long text of letters would be searched from every one of them.
_ASSIGNED = re.compile(
    rf"(?<![\w.@/-])([\w.@/-]+)(=){_VALUE}|(?<![\w.-])([\w.-]+)(['\"]:\s*){_VALUE}|(?<!\S)(--[\w.-]+)(\s+){_VALUE}"
)


@lru_cache(maxsize=1000)
def secret_name(name: str) -> bool:
    """Whether a key or a variable of this name holds a secret: `wandb.api_key`, `HF_TOKEN`, not `num_tokens`."""
    return bool(_NAME.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()))


def secrets_in(node: Any, path: str = "") -> Iterator[str]:
    """A line for every secret in a config, without the secret itself."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            nested = isinstance(value, Mapping) or value in (None, "", [], True, False)
            if why := reason(str(key)):
                yield f"{path or 'a key'}: {why}; {WHY}"
            elif secret_name(str(key)) and not nested:
                yield f"{where}: is named like a secret; {WHY}"
            else:
                yield from secrets_in(value, where)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from secrets_in(value, f"{path}.{i}")
    elif isinstance(node, str | int | float) and (why := reason(str(node))):
        yield f"{path}: {why}; {WHY}"


def reason(text: str) -> str | None:
    """Why a text is taken for a secret, or None."""
    if _URL.search(text) or any(secret_name(found[2]) for found in _QUERY.finditer(text)):
        return "holds a URL with a user name, a password or a token in it"
    if _SHAPE.search(text) or _HEADER.search(text):
        return "looks like an access token"
    return next((f"holds the value of {name}" for value, name in _held() if value in text), None)


def hide(text: str) -> str:
    """A message without secrets: for the terminal, logs and records of what went wrong."""
    for value, _ in _held():
        text = text.replace(value, HIDDEN)
    return _ASSIGNED.sub(_hide_assigned, _without(text))


def redacted(node: Any) -> Any:
    """A config without secrets; the same on every machine, as its hash must be."""
    if isinstance(node, Mapping):
        return {k: HIDDEN if secret_name(str(k)) and isinstance(v, str) else redacted(v) for k, v in node.items()}
    if isinstance(node, list):
        return [redacted(v) for v in node]
    return _without(node) if isinstance(node, str) else node


def redact(override: str) -> str:
    """An override without its secret."""
    key, equals, _ = override.partition("=")
    return f"{key}={HIDDEN}" if equals and secret_name(key) else hide(override)


def _without(text: str) -> str:
    text = _HEADER.sub(rf"\g<1>{HIDDEN}", _SHAPE.sub(HIDDEN, _URL.sub(f"{HIDDEN}@", text)))
    return _QUERY.sub(lambda found: f"{found[1]}{HIDDEN}" if secret_name(found[2]) else found[0], text)


def _hide_assigned(found: re.Match[str]) -> str:
    name, sign = (found[1] or found[4] or found[7]), (found[2] or found[5] or found[8])
    done = name == "key" or HIDDEN[:-1] in found[0]  # "write key=value" is what our own messages say
    return found[0] if done or not secret_name(name) else f"{name}{sign}{HIDDEN}"


def _held() -> Iterator[tuple[str, str]]:
    """(text, name) of the environment's secrets, the longest first, so that none is left standing by half."""
    found = {text: name for name, value in os.environ.items() for text in _kept(name, value)}
    yield from sorted(found.items(), key=lambda pair: -len(pair[0]))


@lru_cache(maxsize=1000)  # asked for at every text of a config
def _kept(name: str, value: str) -> tuple[str, ...]:
    return tuple(_forms(name, value))


def _forms(name: str, value: str) -> Iterator[str]:
    """A variable's secret as it may stand in a text: line by line, and as quoted by Python, JSON and URLs."""
    is_path = value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))
    inside = _PASSWORD.search(value) or _HEADER.search(value)
    secret = value if secret_name(name) and not is_path else inside[inside.re.groups] if inside else ""
    for part in (secret, *secret.splitlines()):
        text = part.strip()
        if len(text) >= SHORTEST:
            raw = os.fsencode(text)  # a variable need not be text
            yield from (text, repr(text)[1:-1], json.dumps(text)[1:-1], quote(raw, ""), quote_plus(raw))
