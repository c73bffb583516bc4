"""A figure: what it says in numbers, its panels, and how to make it again; as SVG for a page, as SVG and PNG in files.

On a page every panel is a picture of its own, so that text keeps its size on a phone; in a file they form a grid.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from moe_lab.cli import cut
from moe_lab.report.arms import Arm
from moe_lab.report.look import STYLE, colour, dash, marker

WIDTH, HEIGHT = 340, 215  # of a panel, CSS pixels
COLUMNS = 3  # of panels in a file
LEGEND_ROW = 16
LONGEST_NAME = 48
PIXELS_PER_INCH = 144  # of PNG: two to a CSS pixel
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tile:
    """A matrix as a picture: strength from -1 to 1, its height on the page, and what it shows in words."""

    label: str
    strength: Array
    height: int
    alt: str


@dataclass(frozen=True)
class Panel:
    title: str
    alt: str
    draw: Callable[[Axes], None]
    tiles: Sequence[Tile] = ()  # what stands on the page in the place of `draw`
    ticks: Sequence[tuple[float, str]] = ()  # below tiles: position from 0 to 1, and text
    square: bool = False  # tiles stand beside each other


@dataclass(frozen=True)
class Figure:
    """finding: the numbers, in a sentence. reads: how to read it. how: where its numbers stand in a run."""

    name: str
    title: str
    finding: str
    reads: str
    how: str
    panels: list[Panel]
    arms: Sequence[Arm] = ()  # of a legend
    height: int = HEIGHT


def inline(panel: Panel, figure: Figure) -> bytes:
    """One panel as SVG."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(WIDTH / 72, figure.height / 72))
        axes = canvas.add_axes((0, 0, 1, 1))
        panel.draw(axes)
        _fit(canvas, axes, figure.height)
        return _saved(canvas, "svg")


def _fit(canvas: Canvas, axes: Axes, height: int) -> None:
    """Room for the labels, which all have the same size: cheaper than a layout engine, which draws everything twice."""
    left = 48 if axes.yaxis.get_visible() else 10
    bottom = 38 if axes.get_xlabel() else 24
    axes.set_position((left / WIDTH, bottom / height, 1 - (left + 8) / WIDTH, 1 - (bottom + 8) / height))


def files(figure: Figure) -> dict[str, bytes]:
    """All panels in one picture, with their titles and the legend: {"svg": ..., "png": ...}."""
    columns = min(COLUMNS, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    names = [cut(arm.name, LONGEST_NAME) for arm in figure.arms]
    per_row = max(1, columns * WIDTH // max([40 + 7 * len(name) for name in names], default=1))
    below = LEGEND_ROW * math.ceil(len(names) / per_row) + 8 if names else 0
    with matplotlib.rc_context(STYLE):
        width, height = columns * WIDTH, rows * (figure.height + 18) + below
        canvas = Canvas(figsize=(width / 72, height / 72), facecolor="white")
        for i, panel in enumerate(figure.panels):
            row, column = divmod(i, columns)
            axes = canvas.add_axes((0, 0, 1, 1))
            panel.draw(axes)
            _place(axes, column * WIDTH, height - (row + 1) * (figure.height + 18), figure.height, width, height)
            axes.set_title(cut(panel.title, LONGEST_NAME), loc="left")
        if names:
            canvas.legend(
                [sample(arm.index) for arm in figure.arms],
                names,
                loc="lower center",
                ncols=per_row,
                borderaxespad=0.2,
                handlelength=3,
            )
        return {form: _saved(canvas, form) for form in ("svg", "png")}


def _place(axes: Axes, x: int, y: int, of_panel: int, width: int, height: int) -> None:
    left = 48 if axes.yaxis.get_visible() else 10
    bottom = 38 if axes.get_xlabel() else 24
    axes.set_position(
        ((x + left) / width, (y + bottom) / height, (WIDTH - left - 12) / width, (of_panel - bottom - 8) / height)
    )


def sample(index: int) -> Line2D:
    """An arm's line and marker, for a legend."""
    return Line2D([], [], color=colour(index), dashes=dash(index) or (None, None), marker=marker(index))


def _saved(canvas: Canvas, form: str) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that the font lacks
        white = {"facecolor": "white"} if form == "png" else {}
        canvas.savefig(out, format=form, dpi=PIXELS_PER_INCH if form == "png" else 72, **white, **_dateless(form))
    return out.getvalue()


def _dateless(form: str) -> dict[str, Any]:
    """The same runs give the same file."""
    return {"metadata": {"Date": None}} if form == "svg" else {"metadata": {"Software": None}}
