"""The load of every expert of every layer as one small picture. L layers, E experts."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# log2(load / balanced load) -> RGB. Lightness falls on both sides of balance, so that the picture also reads in
# grey; an expert without any token is black, which no other load is.
ANCHORS = (
    (-3.0, (17, 58, 112)),
    (-1.0, (96, 150, 200)),
    (0.0, (236, 236, 232)),
    (1.0, (232, 150, 84)),
    (3.0, (130, 28, 20)),
)
DEAD = (0, 0, 0)
CAPTION = "row: MoE layer (0 on top), column: expert; grey: balanced, blue: starved, red: overloaded, black: dead"


def colours(loads_LE: Any) -> np.ndarray:
    """RGB `[L, E, 3]` (uint8) of loads in any unit; each layer is measured against its own mean."""
    loads_LE = np.asarray(loads_LE, dtype=np.float64)
    ratio_LE = loads_LE / np.maximum(loads_LE.mean(axis=1, keepdims=True), 1e-12)
    position_LE = np.log2(np.maximum(ratio_LE, 2.0**-3))
    at = [a for a, _ in ANCHORS]
    rgb = np.stack([np.interp(position_LE, at, [c[i] for _, c in ANCHORS]) for i in range(3)], axis=-1)
    rgb[loads_LE == 0] = DEAD
    return rgb.round().astype(np.uint8)


def heatmap(loads_LE: Any) -> "Image":
    """Picture of `[L][E]` loads: square cells of 4 to 24 pixels, L cells high and E wide."""
    from PIL import Image

    rgb = colours(loads_LE)
    cell = max(4, min(24, 960 // rgb.shape[1]))
    return Image.fromarray(rgb.repeat(cell, axis=0).repeat(cell, axis=1))
