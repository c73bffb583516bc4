"""report.md: the verdicts and tables to paste, the figures beside it. Names are escaped: none is markup."""

import re
from collections.abc import Iterable

from moe_lab.report.page import Part

SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+!|~$^&=:@-])")  # @ and : would link a person, an address or an emoji


def escape(text: str) -> str:
    """CommonMark takes a backslash before any ASCII punctuation."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def markdown(parts: list[Part], command: str) -> str:
    lines = [f"# {escape(', '.join(part.section.title for part in parts))}", ""]
    for part in parts:
        lines += _verdicts(part)
    for part in parts:
        lines += [f"## {escape(part.section.title)}", ""]
        for drawn in part.figures:
            f, file = drawn.figure, f"figures/{part.section.slug}-{drawn.figure.name}.png"
            lines += [
                f"### {escape(f.title)}",
                "",
                escape(f.finding),
                "",
                f"![{escape(f.title)}]({file})",
                "",
                escape(f.reads),
                "",
            ]
        lines += _arms(part) + _unfit(part)
        lines += ["### How to reproduce", "", *_code([part.again]), "", *_code(part.commands), ""]
    return "\n".join([*lines, "Made with", "", *_code([command]), ""])


def _verdicts(part: Part) -> list[str]:
    lines = [f"## Verdicts: {escape(part.section.title)} ({part.tally})", ""]
    lines += [f"*{escape(part.question)}*", ""] if part.question else []
    lines += [line for note in part.section.notes for line in (f"> {escape(note)}", "")]
    for claim in part.claims:
        why = f" {escape(claim.why)}." if claim.why else ""
        changed = " **The claims were edited after its runs began.**" if claim.changed else ""
        lines.append(f"- **{claim.verdict}**: {escape(claim.says)}. {escape(claim.found)}{why}{changed}")
    return [*lines, ""]


def _arms(part: Part) -> list[str]:
    heads = ["arm", "seeds", *(escape(title) for title, _ in part.table.heads), "routing"]
    rows = [
        [escape(name), str(seeds), *(escape(f"{cell.mean} {cell.interval}".strip()) for cell in cells), escape(states)]
        for name, _, seeds, cells, states in part.table.rows
    ]
    return ["### Arms", "", *_table(heads, rows), ""]


def _unfit(part: Part) -> list[str]:
    if not part.unfit:
        return []
    rows = [[escape(x) for x in (run.arm, str(run.seed), run.state, run.why, run.where)] for run in part.unfit]
    return ["### Runs that did not complete", "", *_table(["arm", "seed", "state", "why", "directory"], rows), ""]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _code(lines: Iterable[str]) -> list[str]:
    """An indented block, which nothing inside it can end."""
    return [f"    {line}" for line in lines]
