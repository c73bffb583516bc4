"""Load over time, router against router, expert against domain: matrices of one run of each arm, as small pictures.

Shapes: R rows, L MoE layers, E experts, C domains, N columns of a picture.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moe_lab.cli import cut
from moe_lab.report.arms import Arm
from moe_lab.report.axes import powers
from moe_lab.report.digest import Digest
from moe_lab.report.figure import Figure, Panel, Tile
from moe_lab.report.pixels import rgba
from moe_lab.report.words import number, spread

Array = np.ndarray[Any, Any]
COLUMNS = 120
MOST_PANELS, MOST_LAYERS = 24, 6  # more are chosen from evenly
FULL = 0.5  # a cosine of this has full colour
OCTAVES = 3  # a load of 8 times the fair share, or an eighth, has full colour
SEED = "One seed of each arm, that with the median load CV."
LOAD = f"""A row is an expert, from left to right the steps by their powers. No colour: the expert gets its fair
share. Blue: up to {2**OCTAVES} times as much and more; orange: an eighth and less, dead. A layer that collapses is
a few blue rows among orange ones; an even one stays blank. {SEED}"""
COSINES = f"""Expert against expert, in their own order, a square for each layer. Blue: the two rows point one way
and the two experts compete for the same tokens; orange: they point apart; blank: at right angles. Full colour from
a cosine of {FULL} on. {SEED}"""
DOMAINS = f"""A row is an expert, a column a domain, a picture a layer. Blue: the expert gets more of the domain
than its load explains, orange: less, full colour at {2**OCTAVES} times and an eighth; blank: it takes all domains
alike. {SEED} Columns: """


def load(arms: list[Arm]) -> list[Figure]:
    """Expert x step for each layer."""
    arms, told = chosen([arm for arm in arms if len(arm.typical[1].steps_R) > 1 and arm.typical[1].experts > 1])
    if not arms:
        return []
    fullest = {arm.name: float(np.nanmax(arm.typical[1].load_RLE[-1], axis=-1).max()) for arm in arms}
    return [
        Figure(
            "load",
            "Load of every expert over training",
            f"Load of the fullest expert of any layer at the end, in fair shares: {spread(fullest, 1)}.",
            f"{LOAD}{told}",
            "moe/selected of metrics.jsonl, divided by its mean over experts; experts in the order of their last load",
            [_over_time(arm, 120 if len(arms) <= 6 else 64) for arm in arms],
            height=150,
        )
    ]


def _over_time(arm: Arm, most: int) -> Panel:
    """most: pixels of a layer's height on the page."""
    seed, run = arm.typical
    first, last = max(run.steps_R[0], 1), run.steps_R[-1]
    columns = np.geomspace(first, max(last, first + 1), min(COLUMNS, 8 * len(run.steps_R)))
    at_N = np.searchsorted(run.steps_R, columns - 0.5).clip(max=len(run.steps_R) - 1)
    tiles = []
    for layer in layers_of(run):
        load_RE = run.load_RLE[:, layer]
        order_E = np.argsort(-np.nan_to_num(load_RE[-1]), kind="stable")
        full, empty = np.nanmax(load_RE[-1]), int((load_RE[-1] < 0.01).sum())
        alt = f"layer {layer} at step {last:.0f}: the fullest expert has {full:.1f} times its share, "
        alt += f"{empty} of {run.experts} none"
        height = min(most, max(28, 7 * run.experts))
        tiles.append(Tile(f"layer {layer}", octaves(load_RE[at_N][:, order_E].T), height, alt))
    ticks = [(math.log(t / first) / math.log(max(last, first + 1) / first), f"{t:,}") for t in powers(first, last)]
    alt = f"{arm.name}, seed {seed}: {'; '.join(tile.alt for tile in tiles)}"
    return Panel(arm.name, alt, partial(_stacked, tiles=tiles, ticks=ticks), tiles, ticks)


def cosines(arms: list[Arm]) -> list[Figure]:
    """Router row against router row."""
    arms, told = chosen([arm for arm in arms if arm.typical[1].cosine_LEE is not None and arm.typical[1].experts > 1])
    if not arms:
        return []
    mean = {arm.name: arm.mean("eval/moe/router_cos/mean") for arm in arms}
    return [
        Figure(
            "router-cosines",
            "Cosines between router rows",
            f"Mean over pairs, layers and seeds: {spread(mean)}.",
            f"{COSINES}{told}",
            "eval/moe/router_cos_matrix in the last row of metrics.jsonl that has it; its mean is eval/moe/router_cos",
            [_squares(arm, [_cosine(arm.typical[1], layer) for layer in layers_of(arm.typical[1])]) for arm in arms],
            height=150,
        )
    ]


def _cosine(run: Digest, layer: int) -> Tile:
    assert run.cosine_LEE is not None
    cosine_EE = run.cosine_LEE[layer].copy()
    np.fill_diagonal(cosine_EE, np.nan)
    known = cosine_EE[np.isfinite(cosine_EE)]
    told = (
        f"mean cosine {number(known.mean(), 2)}, highest {number(known.max(), 2)}" if known.size else "no router rows"
    )
    return Tile(f"layer {layer}", cosine_EE / FULL, 110, f"layer {layer}: {told}")


def domains(arms: list[Arm]) -> list[Figure]:
    """Expert against domain."""
    there = [arm for arm in arms if (c := arm.typical[1].counts_LEC) is not None and min(c.shape[1:]) > 1]
    arms, told = chosen(there)
    if not arms:
        return []
    beyond = {arm.name: arm.mean("domain beyond chance") for arm in arms}
    names = cut(", ".join(arms[0].typical[1].domains), 600)
    return [
        Figure(
            "domains",
            "Which expert serves which domain",
            f"What the choice tells of the domain beyond chance, of 1, mean over layers and seeds: {spread(beyond)}.",
            f"{DOMAINS}{names}.{told}",
            "eval/moe/domain_counts in the last row of metrics.jsonl that holds it, over the product of its margins; "
            "the number is eval/moe/nmi_domain minus eval/moe/nmi_domain_floor",
            [_squares(arm, [_lift(arm.typical[1], layer) for layer in layers_of(arm.typical[1])]) for arm in arms],
            height=150,
        )
    ]


def _lift(run: Digest, layer: int) -> Tile:
    assert run.counts_LEC is not None
    counts_EC = run.counts_LEC[layer]
    with np.errstate(all="ignore"):
        expected_EC = counts_EC.sum(1, keepdims=True) * counts_EC.sum(0, keepdims=True) / counts_EC.sum()
        lift_EC = counts_EC / np.where(expected_EC > 0, expected_EC, np.nan)
    known = np.isfinite(lift_EC).any()
    e, c = np.unravel_index(np.nanargmax(lift_EC), lift_EC.shape) if known else (0, 0)
    told = f"strongest: expert {e} gets {run.domains[c]} {lift_EC[e, c]:.1f} times as often" if known else "no choices"
    return Tile(f"layer {layer}", octaves(lift_EC), 110, f"layer {layer}: {told}")


def octaves(times: Array) -> Array:
    """How often something is of what would be even -> -1 to 1; 0 times is -1."""
    with np.errstate(all="ignore"):
        return np.clip(np.log2(times) / OCTAVES, -1, 1)


def chosen(arms: list[Arm]) -> tuple[list[Arm], str]:
    """As many arms as fit, and what to say where these are not all."""
    if len(arms) <= MOST_PANELS:
        return arms, ""
    return evenly(arms, MOST_PANELS), f" Shown are {MOST_PANELS} of {len(arms)} arms, evenly chosen."


def layers_of(run: Digest) -> list[int]:
    return evenly(list(range(run.layers)), MOST_LAYERS)


def evenly(items: list[Any], most: int) -> list[Any]:
    at = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[i] for i in at]


def _squares(arm: Arm, tiles: list[Tile]) -> Panel:
    alt = f"{arm.name}, seed {arm.typical[0]}: {'; '.join(tile.alt for tile in tiles)}"
    return Panel(arm.name, alt, partial(_beside, tiles=tiles), tiles, square=True)


def _stacked(axes: Axes, tiles: list[Tile], ticks: Iterable[tuple[float, str]]) -> None:
    """The page's tiles in one pair of axes, for a file."""
    for row, tile in enumerate(tiles):
        _image(axes, tile, (0, 1, row + 0.96, row + 0.04))
    _frame(axes, (0, 1), (len(tiles), 0))
    axes.set_yticks([row + 0.5 for row in range(len(tiles))], [tile.label.removeprefix("layer ") for tile in tiles])
    axes.set_ylabel("layer")
    axes.set_xticks([at for at, _ in ticks], [text for _, text in ticks])


def _beside(axes: Axes, tiles: list[Tile]) -> None:
    for column, tile in enumerate(tiles):
        _image(axes, tile, (column + 0.03, column + 0.97, 1, 0))
    _frame(axes, (0, max(2, len(tiles))), (1, 0))
    axes.set_xticks([column + 0.5 for column in range(len(tiles))], [tile.label for tile in tiles])
    axes.set_yticks([])


def _image(axes: Axes, tile: Tile, extent: tuple[float, float, float, float]) -> None:
    axes.imshow(rgba(tile.strength), extent=extent, interpolation="none", aspect="auto")


def _frame(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set(xlim=x, ylim=y)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
