"""Axes as all figures have them."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator


def powers(first: float, last: float) -> list[int]:
    """The powers of ten from first to last, and the last itself where it is not too near to one."""
    found = [10**p for p in range(math.ceil(math.log10(max(first, 1))), math.floor(math.log10(max(last, 1))) + 1)]
    return [*found, round(last)] if not found or last > 2 * found[-1] else found


def log_steps(axes: Axes, first: float, last: float) -> None:
    """The first updates decide, so that steps are shown by their powers."""
    axes.set_xscale("log")
    ticks = powers(first, last)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{t:,}" for t in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("step")
    axes.set_xlim(max(first, 1), max(last, first + 1))


def evaluations(axes: Axes, steps: Sequence[float]) -> None:
    """A few steps, as they lie; the first, the last, and of the others those that fit."""
    room = (steps[-1] - steps[0]) / 6
    ticks = [steps[0], *(s for s in steps[1:-1] if s - steps[0] > room < steps[-1] - s), *steps[-1:]]
    axes.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
    axes.set_xlabel("step")


def line_at(axes: Axes, y: float, says: str, colour: str) -> None:
    """A level that has a meaning, and the word for it."""
    axes.axhline(y, color=colour, linewidth=0.8, dashes=(3, 2))
    axes.annotate(says, (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9, color=colour)


def names_as_rows(axes: Axes, names: Sequence[str], colours: Sequence[str]) -> None:
    """A row per name, the name above its row: long names need no margin."""
    axes.set_ylim(len(names) - 0.35, -0.75)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    for row, (name, colour) in enumerate(zip(names, colours, strict=True)):
        axes.annotate(
            name, (0, row), xycoords=("axes fraction", "data"), xytext=(0, 7), textcoords="offset points",
            fontsize=10, color=colour,
        )  # fmt: skip
