"""What conf/ says about itself, read as text (no yaml parser, no Hydra): for help, `list` and tab completion.

In each file the first comment that is no `# @package` line says what it is; each key may end in a comment of its own.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_KEY = re.compile(r"^(?P<indent> *)(?P<name>[A-Za-z_][\w/]*):(?:\s+(?P<value>[^#\s].*?))?\s*(?:\s#\s*(?P<about>.*))?$")
_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)")


@dataclass(frozen=True)
class Key:
    path: str  # dotted, as typed on the command line
    value: str
    about: str


@dataclass
class Preset:
    name: str
    about: str = ""
    package: str = ""  # from the file's `# @package` line: the node it fills, where that is not the group
    keys: list[Key] = field(default_factory=list)

    def has(self, path: str) -> bool:
        return any(key.path == path for key in self.keys)


@dataclass
class Group:
    name: str
    presets: dict[str, Preset]
    chosen: list[str]  # by conf/train.yaml
    many: bool  # takes a list, e.g. balance=[switch,z_loss]


def conf_dir() -> Path:
    """conf/ beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def sweeps_dir() -> Path:
    """The studies that come with moe-lab, found like conf/."""
    return conf_dir().parent / "sweeps"


def own_dir() -> Path | None:
    """The user's own configs: MOE_LAB_CONFIG_DIR, else ./moe_lab_conf where there is one."""
    named = os.environ.get("MOE_LAB_CONFIG_DIR")
    if named:
        return Path(named)
    return Path("moe_lab_conf") if Path("moe_lab_conf").is_dir() else None


def clashes(own: Path) -> list[str]:
    """A line for each file of `own` that Hydra would never read, since conf/ has one of the same name."""
    conf = conf_dir()
    if own.resolve() == conf.resolve():
        return []
    named = sorted(path for pattern in ("*.yaml", "*/*.yaml") for path in own.glob(pattern))
    taken = [path for path in named if (conf / path.relative_to(own)).exists()]
    return [f"{path}: moe-lab has a {path.relative_to(own)} of its own; give yours another name" for path in taken]


def choosable(own: Path) -> list[Path]:
    """The files of `own` that can be chosen: beside its groups and below them. The folder may be a whole project."""
    groups = [*defaults(conf_dir() / "train.yaml"), "hydra"]
    return sorted({*own.glob("*.yaml"), *(path for group in groups for path in (own / group).rglob("*.yaml"))})


def read(path: Path, prefix: str = "") -> Preset:
    """A preset from its file; `prefix` is put before its keys unless its `# @package` line names another."""
    preset = Preset(path.stem)
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = "".join(c if c.isprintable() else " " for c in line)  # it is shown to a terminal
        if found := _PACKAGE.match(line):
            preset.package = found[1]
        elif line.startswith("#"):
            preset.about = preset.about or line.lstrip("# ").strip()
        elif found := _KEY.match(line):
            indent = len(found["indent"])
            while parents and parents[-1][0] >= indent:
                parents.pop()
            where = preset.package if preset.package not in ("", "_global_") else prefix
            dotted = ".".join(filter(None, [where, *(name for _, name in parents), found["name"]]))
            if found["value"] is None:
                parents.append((indent, found["name"]))
            else:
                preset.keys.append(Key(dotted, found["value"], found["about"] or ""))
    return preset


def defaults(train_yaml: Path) -> dict[str, list[str]]:
    """The options that conf/train.yaml chooses, by group."""
    chosen: dict[str, list[str]] = {}
    for line in train_yaml.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"^\s+- (\w+): (\[.*\]|\S+)", line):
            chosen[found[1]] = [name.strip() for name in found[2].strip("[]").split(",") if name.strip()]
    return chosen


def root_keys(conf: Path) -> list[Key]:
    """The keys of train.yaml that belong to no group."""
    hidden = ("defaults", "hydra", "balance", "explore")
    return [key for key in read(conf / "train.yaml").keys if key.path.split(".")[0] not in hidden]


def groups(own: Path | None = None) -> dict[str, Group]:
    """Every group with its presets, ours and those in `own`."""
    conf = conf_dir()
    text = (conf / "train.yaml").read_text(encoding="utf-8")
    found = {name: _group(name, chosen, text) for name, chosen in defaults(conf / "train.yaml").items()}
    for base in filter(None, (conf, own)):
        for folder in _folders(base):
            group = found.setdefault(folder.name, _group(folder.name, [], ""))
            for path in sorted(folder.glob("*.yaml")):
                if path.name.isprintable():
                    group.presets[path.stem] = read(path, folder.name)
    return {name: group for name, group in found.items() if group.presets}


def _group(name: str, chosen: list[str], train_yaml: str) -> Group:
    return Group(name, {}, chosen, bool(re.search(rf"^\s+- {name}: \[", train_yaml, re.MULTILINE)))


def _folders(base: Path) -> Iterator[Path]:
    if base.is_dir():
        yield from (
            path
            for path in sorted(base.iterdir())
            if path.is_dir() and path.name.isprintable() and path.name not in ("hydra", "__pycache__")
        )
