"""One hash over the code and the presets that make a run's numbers, so that results of two versions are told apart."""

import hashlib
from functools import cache
from pathlib import Path

from moe_lab import presets

READERS = ("verbs", "study", "report")  # start runs and read what they wrote: no number of a run depends on them


@cache
def sources() -> str:
    """sha256 (16 hex digits) over moe_lab/**/*.py, but for what only reads, and conf/**/*.yaml; the same in a wheel."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    code = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in READERS]
    for base, paths in ((package, code), (presets.conf_dir(), presets.conf_dir().rglob("*.yaml"))):
        for path in sorted(paths):
            content = path.read_bytes()
            digest.update(f"{base.name}/{path.relative_to(base).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
