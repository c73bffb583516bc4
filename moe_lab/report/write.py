"""A report's files: report.html, report.md, summary.csv and figures/."""

import io
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from moe_lab import durable
from moe_lab.report import figure, markdown, page, tables
from moe_lab.report.arms import Section, section
from moe_lab.report.words import clean
from moe_lab.spreadsheet import write_csv
from moe_lab.study.judge import Verdict
from moe_lab.study.results import Results


def report(results: Sequence[Results], verdicts: Sequence[list[Verdict]], out: Path) -> list[Path]:
    """Write all of it into `out` and return what was written; `verdicts` holds a list for each of the results."""
    sections: list[Section] = []
    for found, judged in zip(results, verdicts, strict=True):
        sections.append(section(found, judged, [s.slug for s in sections]))
    folders = " ".join(shlex.quote(clean(str(found.sweep.folder), 2000)) for found in results)
    command = f"moe-lab report {folders} --out {shlex.quote(clean(str(out), 2000))}"
    figures = [page.figures(s) for s in sections]
    parts = [page.part(s, of_section) for s, of_section in zip(sections, figures, strict=True)]
    files = {"report.html": page.html(parts, command).encode(), "report.md": markdown.markdown(parts, command).encode()}
    table = io.StringIO()
    write_csv(tables.of_runs(sections), table)
    files["summary.csv"] = table.getvalue().encode()
    for s, of_section in zip(sections, figures, strict=True):
        for f in of_section:
            files |= {f"figures/{s.slug}-{f.name}.{form}": drawn for form, drawn in figure.files(f).items()}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name in _shown_before(out) - set(files):
        (out / name).unlink(missing_ok=True)
    for name, content in files.items():
        durable.write(out / name, content)
    return [out / name for name in files]


def _shown_before(out: Path) -> set[str]:
    """Figures that an earlier report.md here shows: of arms that are gone, they would be taken for this report's."""
    text = (out / "report.md").read_text(errors="replace") if (out / "report.md").is_file() else ""
    stems = set(re.findall(r"figures/([\w.-]+)\.(?:svg|png)", text))
    return {f"figures/{stem}.{form}" for stem in stems for form in ("svg", "png")}
