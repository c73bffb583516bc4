"""report.html: one file that needs nothing else, runs nothing, and reaches nowhere."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moe_lab import __version__
from moe_lab.report import claims, curves, figure, look, matrices, svg, tables
from moe_lab.report.arms import Arm, Section
from moe_lab.report.figure import Figure, Panel
from moe_lab.report.pixels import data_uri
from moe_lab.report.words import clean

HERE = Path(__file__).parent
FIGURES = (
    *(matrices.load, curves.balance, curves.loss, curves.frontier, matrices.cosines, matrices.domains, curves.churn),
    curves.expert_loss,
)


def figures(section: Section) -> list[Figure]:
    """All that its runs have numbers for, in the order of reading."""
    return [found for make in FIGURES for found in make(section.arms)]


@dataclass(frozen=True)
class Drawn:
    """A figure on the page; panels: (panel, its SVG or nothing where it has tiles)."""

    figure: Figure
    panels: list[tuple[Panel, str]]


@dataclass(frozen=True)
class Part:
    """A study on the page."""

    section: Section
    question: str
    source: str
    unequal: list[str]
    claims: list[claims.ClaimView]
    tally: str
    figures: list[Drawn]
    table: tables.Table
    unfit: list[tables.Unfit]
    commands: list[str]
    again: str


def part(section: Section, found: list[Figure]) -> Part:
    sweep, study = section.results.sweep, section.results.sweep.study
    return Part(
        section,
        clean(study.question) if study else "",
        clean(study.source) if study else "",
        [f"{clean(key)}: {clean(why)}" for key, why in study.unequal.items()] if study else [],
        [claims.view(verdict) for verdict in section.verdicts],
        claims.tally(section.verdicts),
        [_drawn(section, f) for f in found],
        tables.of_arms(section),
        tables.unfit(section),
        tables.commands(section),
        clean(sweep.command, 2000) or f"moe-lab report {shlex.quote(clean(str(sweep.folder), 2000))}",
    )


def _drawn(section: Section, found: Figure) -> Drawn:
    drawn = []
    for i, panel in enumerate(found.panels):
        prefix = f"{section.slug}-{found.name}-{i}"
        drawn.append((panel, "" if panel.tiles else Markup(svg.fit(figure.inline(panel, found), prefix, panel.alt))))
    return Drawn(found, drawn)


def html(parts: list[Part], command: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"data_uri": data_uri, "swatch": swatch, "changed": claims.CHANGED}
    css = Markup((HERE / "page.css").read_text(encoding="utf-8"))
    title = ", ".join(part.section.title for part in parts[:3]) + (" and more" if len(parts) > 3 else "")
    return environment.get_template("page.html.j2").render(
        parts=parts, css=css, title=title, command=command, version=__version__
    )


def swatch(arm: Arm | int) -> Any:
    """An arm's line and marker, for a legend; made of numbers alone."""
    index = arm if isinstance(arm, int) else arm.index
    dashes = " ".join(f"{d * 1.6:g}" for d in look.dash(index))
    var = f"var(--arm{index % len(look.ARMS)})"
    line = f'<path d="M0 6H26" stroke="{var}" stroke-width="2" stroke-dasharray="{dashes}"/>'
    return Markup(
        f'<svg class="swatch" viewBox="0 0 26 12" aria-hidden="true">{line}{_shape(look.marker(index), var)}</svg>'
    )


def _shape(marker: str, colour: str) -> str:
    paths = {
        "o": "M9.5 6a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
        "s": "M10 3h6v6h-6z",
        "^": "M13 2l4 7.5h-8z",
        "D": "M13 1.5l4.5 4.5-4.5 4.5-4.5-4.5z",
        "v": "M13 10l4-7.5h-8z",
    }
    return f'<path d="{paths[marker]}" fill="{colour}"/>'
