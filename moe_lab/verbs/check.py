"""`moe-lab check DIR...`: what became of a study's claims. The judge is moe_lab/study/judge.py; here it is told."""

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab import reading
from moe_lab.cli import arguments, complain, printable, quiet_pipe
from moe_lab.reading import FOREIGN, Damaged

if TYPE_CHECKING:
    from moe_lab.study.judge import Verdict
    from moe_lab.study.results import Results

ABOUT = """Judge the claims of a study by the runs in its sweep's folder: supported, refuted or inconclusive. A number
stands with its interval over seeds, whose level takes account of all claims of the study; docs/judging.md explains
each. The exit code is 0 whatever the verdicts are, 1 where they are not those of --expect."""
COLOURS = {"supported": "green", "refuted": "red", "inconclusive": "yellow"}
INDENT = " " * 14
Judged = list[tuple["Results", "list[Verdict]"]]


def main(argv: list[str]) -> int:
    parser = arguments("check", ABOUT)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a sweep's folder")
    parser.add_argument("--expect", type=Path, metavar="FILE", help="verdicts as --json once wrote them")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    asked = parser.parse_args(argv)
    quiet_pipe()
    try:
        expected = _expected(asked.expect) if asked.expect else None
        judged = [_judged(folder) for folder in asked.folders]
    except ValueError as error:
        return complain(str(error).splitlines(), 4 if isinstance(error, Damaged) else 2)
    if asked.json:
        print(json.dumps({"studies": [as_json(*one) for one in judged]}, indent=1, allow_nan=False))
    else:
        _print(judged)
    wrong = list(differences(expected, judged)) if expected is not None else []
    return complain([f"{asked.expect}: {line}" for line in wrong], 1) if wrong else 0


def _judged(folder: Path) -> "tuple[Results, list[Verdict]]":
    from moe_lab.study.judge import judge
    from moe_lab.study.results import load

    results = load(folder)
    if results.sweep.study is None:
        raise ValueError(f"{folder}: makes no claims; those stand in a study's file (moe-lab sweep NAME)")
    try:
        return results, judge(results.sweep.study, results)
    except Damaged:
        raise
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def as_json(results: "Results", verdicts: "list[Verdict]") -> dict[str, Any]:
    """A study with its verdicts, as --json writes them and --expect reads them."""
    sweep = results.sweep
    told = {"name": sweep.name, "scale": sweep.scale, "folder": str(sweep.folder), "claims_sha256": sweep.claims}
    return told | {"notes": results.notes, "verdicts": [verdict.as_json() for verdict in verdicts]}


Key = tuple[str, str | None, str]  # study, scale, what the claim says


def _expected(path: Path) -> dict[Key, str]:
    try:
        studies = reading.json_file(path)["studies"]
        return {(s["name"], s["scale"], v["claim"]["says"]): str(v["verdict"]) for s in studies for v in s["verdicts"]}
    except (OSError, ValueError, *FOREIGN) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else "not what moe-lab check --json writes"
        raise ValueError(f"{path}: {why}") from None


def differences(expected: dict[Key, str], judged: Judged) -> Iterator[str]:
    """A line for each verdict that is not the expected one, of claims on either side."""
    found = {(r.sweep.name, r.sweep.scale, v.claim.says): v.verdict for r, verdicts in judged for v in verdicts}
    for key in dict.fromkeys((*expected, *found)):
        before, now = expected.get(key, "absent"), found.get(key, "absent")
        if before != now:
            name, scale, says = key
            yield f"{name}{f' ({scale})' if scale else ''}: {says}: expected {before}, is {now}"


def _print(judged: Judged) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    width = console.width if console.is_terminal else sys.maxsize
    for i, (results, verdicts) in enumerate(judged):
        assert results.sweep.study is not None
        title = f"{results.sweep.name}: {results.sweep.study.question}"
        lines = [Text(line, "bold") for line in _wrapped(title, width, "")]
        lines += [Text(line, "yellow") for note in results.notes for line in _wrapped(f"note: {note}", width, "")]
        console.print(*([Text()] if i else []), *lines, sep="\n")
        for verdict in verdicts:
            console.print(Text(f"{verdict.verdict:<14}", COLOURS[verdict.verdict]), end="")
            first, *more = told(verdict, width)
            console.print(Text(first[len(INDENT) :]), *(Text(line) for line in more), sep="\n")
            console.print(*(Text(line, "dim") for line in besides(verdict, width)), sep="\n")


def told(verdict: "Verdict", width: int) -> list[str]:
    """What is claimed and what was found, on one line where there is room."""
    changed = " *changed after results*" if verdict.changed else ""
    return _together([f"{verdict.claim.says}{changed}", _found(verdict)], ": ", width)


def besides(verdict: "Verdict", width: int) -> list[str]:
    """What would settle it, what was measured, and the same question asked in other ways."""
    of = {"difference": " minus ", "ratio": " over "}[verdict.claim.by].join(verdict.claim.arms())
    e, measured = verdict.estimate, [f"{verdict.claim.metric} of {of}"]
    if e is not None and e.p is not None:
        tests = f"p {e.p:.2g}, by sign flips {e.sign_flip_p:.3g} (at best {e.sign_flip_floor:.3g})"
        measured.append(f"{tests}; bootstrap {_interval(e.boot_low, e.boot_high)}")
    why = verdict.why.split("; ") if verdict.why else []
    return [line for part in why for line in _wrapped(part, width)] + _together(measured, "; ", width)


def _together(parts: list[str], between: str, width: int) -> list[str]:
    whole = INDENT + printable(between.join(parts))
    return [whole] if len(whole) <= width else [line for part in parts for line in _wrapped(part, width)]


def _found(verdict: "Verdict") -> str:
    from moe_lab.study.judge import bound

    e, claimed = verdict.estimate, bound(verdict.claim)
    ratio = "ratio " if verdict.claim.by == "ratio" else ""
    if e is None:
        return f"nothing; {ratio}claimed {claimed}"
    seeds = f"{e.n} seed{'s' if e.n > 1 else ''}"
    if e.p is None:
        return f"{ratio}{e.mean:.4g}; claimed {claimed}; {seeds}"
    return f"{ratio}{e.mean:.4g} {_interval(e.low, e.high)} at {100 * e.level:.4g} %; claimed {claimed}; {seeds}"


def _interval(low: float | None, high: float | None) -> str:
    return f"[{low:.4g}, {high:.4g}]"


def _wrapped(text: str, width: int, indent: str = INDENT) -> list[str]:
    more = indent or "  "
    return textwrap.wrap(printable(text), max(width, 40), initial_indent=indent, subsequent_indent=more)
