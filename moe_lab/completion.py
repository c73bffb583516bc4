"""Tab completion in bash, from the text of conf/ alone: without Hydra a key press takes a few hundredths of a second.

`moe-lab -sc install=bash` prints the shell's side; it asks `moe-lab -sc query=bash` with COMP_LINE and COMP_POINT.
"""

import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from moe_lab import presets
from moe_lab.cli import VERBS, complain

SCRIPT = """_moe_lab() {
    COMPREPLY=()
    local line
    while IFS= read -r line; do COMPREPLY+=("$line"); done < <(
        COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
            "${COMP_WORDS[0]}" -sc query=bash 2>/dev/null)
}
complete -o nospace -o default -F _moe_lab moe-lab
"""
FLAGS = ("--help", "--multirun", "--cfg", "--resolve", "--info", "--config-dir", "--config-name", "--hydra-help")
AFTER = {
    "--cfg": ("job", "hydra", "all"),
    "-c": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--format": ("csv", "parquet"),
}
FILES = ("--config-dir", "-cd", "--config-name", "-cn", "--out")
LAUNCHERS = ("basic", "joblib", "submitit_local", "submitit_slurm")


def main(argv: list[str]) -> int:
    if argv == ["install=bash"]:
        print(SCRIPT, end="")
    elif argv == ["uninstall=bash"]:
        print("complete -r moe-lab; unset -f _moe_lab")
    elif argv == ["query=bash"]:
        line = os.environ.get("COMP_LINE", "")
        point = int(os.environ.get("COMP_POINT") or len(line))
        _reply(line.encode()[:point].decode(errors="ignore"), os.environ.get("COMP_WORDBREAKS", ""))
    else:
        return complain(['completion is for bash: eval "$(moe-lab -sc install=bash)"'])
    return 0


def _reply(line: str, breaks: str) -> None:
    word = "" if line.endswith(" ") else line.split(" ")[-1]
    cut = word.rfind("=") + 1 if "=" in breaks else 0  # bash replaces only what follows a word break
    for found in complete(line):
        print(found[cut:])


def complete(line: str) -> list[str]:
    """The words that the last word of `line` may become; a final one ends in a space."""
    *before, word = line.split(" ")
    before = [w for w in before if w][1:]  # without the program's name
    if not before:
        return [f"{verb} " for verb in VERBS if verb.startswith(word)]
    if before[-1] in AFTER:
        return [f"{value} " for value in AFTER[before[-1]] if value.startswith(word)]
    if before[-1] in FILES:
        return []  # bash completes file names
    if before[0] == "list":
        names = () if len(before) > 1 else [*presets.groups(presets.own_dir()), "sweeps"]
        return [f"{name} " for name in names if name.startswith(word)]
    if before == ["sweep"]:
        names = {path.stem for folder in (presets.sweeps_dir(), Path("sweeps")) for path in folder.glob("*.yaml")}
        return [f"{name} " for name in sorted(names) if name.startswith(word)]
    return _train(word, before[1:]) if before[0] == "train" else []


def _train(word: str, before: list[str]) -> list[str]:
    if word.startswith("-"):
        return [f"{flag} " for flag in FLAGS if flag.startswith(word)]
    groups = presets.groups(_config_dir(before))
    key, equals, value = word.partition("=")
    if key == "hydra/launcher" and equals:
        return [f"{key}={name} " for name in LAUNCHERS if name.startswith(value)]
    if equals and key in groups:
        return _values(groups[key], key, value, "-m" in before or "--multirun" in before)
    if equals:
        return _choices(key, value, groups, before)
    return sorted(_heads(word, groups, before))


def _values(group: presets.Group, key: str, value: str, multirun: bool) -> list[str]:
    """The group's options; inside a list or a sweep the next one, without those that are there already."""
    opened = value.startswith("[")
    if group.many and not value:
        return [f"{key}=["]
    done, comma, last = value.lstrip("[").rpartition(",")
    if comma and not (opened or multirun):
        return []
    names = [name for name in group.presets if name.startswith(last) and name not in done.split(",")]
    end = "" if opened or multirun else " "  # a comma, a bracket or a space may follow
    return [f"{key}={'[' if opened else ''}{done}{comma}{name}{end}" for name in names]


def _choices(key: str, value: str, groups: dict[str, presets.Group], before: list[str]) -> list[str]:
    """What the comment of a key offers: `a | b | c`, and true or false."""
    for found in _keys(groups, before):
        if found.path == key:
            offered = {"true", "false"} if found.value in ("true", "false") else set()
            if " | " in found.about:
                offered |= {part.split(" (")[0].strip() for part in found.about.split(" | ")}
            return [f"{key}={name} " for name in sorted(offered) if name.startswith(value) and " " not in name]
    return []


def _heads(word: str, groups: dict[str, presets.Group], before: list[str]) -> set[str]:
    """Groups and keys; those under a dot one level at a time."""
    heads = {f"{name}=" for name in (*groups, "hydra/launcher") if name.startswith(word)}
    for key in _keys(groups, before):
        if key.path.startswith(word) and not key.path.endswith(".name"):
            rest, dot, _ = key.path[len(word) :].partition(".")
            heads.add(f"{word}{rest}{dot}" if dot else f"{key.path}=")
    return heads


def _keys(groups: dict[str, presets.Group], before: Iterable[str]) -> list[presets.Key]:
    """The root keys, and those of the options that are chosen on the line or by default."""
    chosen = {name: group.chosen for name, group in groups.items()}
    for word in before:
        name, equals, value = word.partition("=")
        if equals and name in chosen:
            chosen[name] = value.strip("[]").split(",")
    picked = (groups[name].presets.get(option) for name, options in chosen.items() for option in options)
    return [*presets.root_keys(presets.conf_dir()), *(key for preset in picked if preset for key in preset.keys)]


def _config_dir(before: list[str]) -> Path | None:
    for flag, value in pairwise(before):
        if flag in ("--config-dir", "-cd"):
            return Path(value)
    return presets.own_dir()
