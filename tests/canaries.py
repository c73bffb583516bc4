"""Secrets that belong to nobody, and a search for them in every byte, however they are spelled or packed."""

import base64
import io
import json
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from wandb_reader import records

PEM = "-----BEGIN PRIVATE KEY-----\nMIICdgIBADANBgkqhkiG9w0B\nY2FuYXJ5IGluIGEgY29hbCBt\n-----END PRIVATE KEY-----\n"
# Variables of the environment; the last word of each is what must not be found.
ENVIRONMENT = {
    "WANDB_API_KEY": "3fb1c7d90a4e5826c7d90a4e58263fb1c7d90a4e",
    "HF_TOKEN": "hf_cAnArYaQwErTyUiOpAsDfGhJkLzX",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCaNaRyKeY",
    "OPENAI_API_KEY": "sk-proj-cAnArY4-_5fG6hJ7kL8zX9cV0bN1mQ2w",
    "GITHUB_TOKEN": "ghp_cAnArY0123456789AbCdEfGhIjKlMnOp",
    "PGPASSWORD": "cän'ar\"y\\pass & w0rd",
    "SIGNING_KEY": PEM,
    "MY_SECRETS": "first-canary-of-two\nsecond-canary-of-two\n",
    "DOOR_PIN_TOKEN": "8675309867",
    "DATABASE_URL": "postgres://alice:pg-canary-4711@db.example:5432/runs",
    "HTTPS_PROXY": "http://bob:proxy/canary@0815@127.0.0.1:9",
    "WANDB_BASE_URL": "http://carol:base-canary-1234@127.0.0.1:9",
    "WANDB_X_EXTRA_HTTP_HEADERS": json.dumps({"Authorization": "Bearer header-canary-42"}),
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "remote.origin.url",
    "GIT_CONFIG_VALUE_0": "https://dave:git-canary-9876@git.example/x/y.git",
}
# Files of the user's, beside or above a run.
FILES = {
    "home/.netrc": "machine api.wandb.ai login user password netrc-canary-0123456789abcdef0123\n",
    "home/.config/wandb/settings": "[default]\napi_key = settings-canary-0123456789abcdef012\n",
    "home/.cache/huggingface/token": "hf_fIlEcAnArYaQwErTyUiOpAsDfGhJk",
    "home/.aws/credentials": "[default]\naws_secret_access_key = aws-file-canary-0123456789abcdef\n",
    ".env": "OPENAI_API_KEY=dotenv-canary-0123456789\n",
    ".git/config": '[remote "origin"]\n\turl = https://erin:gitfile-canary-55@git.example/z.git\n',
}
SECRETS = [
    *(ENVIRONMENT[name] for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")),
    *(ENVIRONMENT[name] for name in ("GITHUB_TOKEN", "PGPASSWORD", "DOOR_PIN_TOKEN")),
    *PEM.splitlines()[1:3],
    *("first-canary-of-two", "second-canary-of-two", "pg-canary-4711", "proxy/canary@0815", "base-canary-1234"),
    *("header-canary-42", "git-canary-9876", "gitfile-canary-55", "netrc-canary-0123456789abcdef0123"),
    *("settings-canary-0123456789abcdef012", "hf_fIlEcAnArYaQwErTyUiOpAsDfGhJk"),
    *("aws-file-canary-0123456789abcdef", "dotenv-canary-0123456789"),
]


def spellings(secret: str) -> set[bytes]:
    """The ways in which a text may stand in a file."""
    plain = secret.encode()
    texts = {
        *(secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]),
        *(urllib.parse.quote(secret), urllib.parse.quote(secret, ""), urllib.parse.quote_plus(secret), plain.hex()),
    }
    # Base64 of a text that holds it, whatever stands before: all but the characters that depend on the neighbours.
    inside = {base64.b64encode(b"\0" * before + plain)[(0, 2, 3)[before] : -4] for before in (0, 1, 2)}
    return {*(t.encode() for t in texts), *(secret.encode(code) for code in ("utf-16-le", "utf-16-be")), *inside}


NEEDLES = {needle: secret for secret in SECRETS for needle in spellings(secret)}


def found(content: bytes) -> set[str]:
    """The secrets in a file's bytes."""
    return {secret for part in unpacked(content) for needle, secret in NEEDLES.items() if needle in part}


def unpacked(content: bytes) -> Iterator[bytes]:
    """The bytes themselves, and those of every deflated stream and every zip in them."""
    yield content
    for start in _starts(content, (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda", b"\x1f\x8b")):
        try:
            yield zlib.decompressobj(wbits=47).decompress(content[start:], 1 << 24)
        except zlib.error:
            continue
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def _starts(content: bytes, heads: Iterable[bytes]) -> Iterator[int]:
    for head in heads:
        at = content.find(head)
        while at >= 0:
            yield at
            at = content.find(head, at + 1)


def leaks(root: Path) -> dict[str, set[str]]:
    """{file: secrets} for everything below `root`, names of files too, but what the user put there."""
    hits: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        content = path.read_bytes() if path.is_file() and name not in FILES else b""
        if path.suffix == ".wandb":  # its records are cut into blocks
            content += b"".join(record.SerializeToString() for record in records(path))
        if secrets := found(name.encode()) | found(content):
            hits[name] = secrets
    return hits
