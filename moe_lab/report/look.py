"""Colours, line styles and markers of the figures, for light and dark paper; safe for the colour-blind.

Figures are drawn in the light colours. On the page each of these becomes a CSS variable, which page.css sets for both.
"""

from typing import Any

INK, MUTED, RULE = "#1c1d1f", "#63666b", "#dcdcd8"
# Found by a search: a contrast of 3 with the paper, and 12 of CIELAB's units apart under each kind of colour blindness.
ARMS = ("#1166aa", "#cc5522", "#118866", "#9955ff", "#661100", "#330099", "#551155")
VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)"} | {
    colour: f"var(--arm{i})" for i, colour in enumerate(ARMS)
}
DASHES = ((), (5, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5))
MARKERS = ("o", "s", "^", "D", "v")
OVER, UNDER, UNKNOWN = (30, 112, 190), (213, 94, 0), (128, 128, 128)  # seen on white and on black


def colour(index: int) -> str:
    return ARMS[index % len(ARMS)]


def dash(index: int) -> tuple[float, ...]:
    """The first round of colours is solid."""
    return DASHES[index // len(ARMS) % len(DASHES)]


def marker(index: int) -> str:
    """Markers differ from the first arm on: they are large enough to help."""
    return MARKERS[index % len(MARKERS)]


STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "moe-lab",
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
