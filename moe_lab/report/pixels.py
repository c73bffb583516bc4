"""Matrices as small pictures: nothing where all is as expected, blue for more, vermilion for less.

The strength is the opacity, so that one picture serves light and dark paper: what is even stays as
quiet as the page.
"""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from moe_lab.report.look import OVER, UNDER, UNKNOWN

STEPS = 24  # of opacity, each way
Array = np.ndarray[Any, Any]


def index_of(strength: Array) -> Array:
    """-1 to 1 -> index into the palette; the middle is transparent and what is undefined has an index of its own."""
    known = np.nan_to_num(np.clip(strength, -1, 1), nan=0.0)
    return np.where(np.isfinite(strength), np.rint(known * STEPS).astype(int) + STEPS, 2 * STEPS + 1).astype(np.uint8)


def palette() -> Array:
    """RGBA of each index, uint8 [2 STEPS + 2, 4]."""
    levels = np.arange(-STEPS, STEPS + 1)
    opacity = np.rint(255 * (np.abs(levels) / STEPS) ** 0.8)
    colours = [UNDER if level < 0 else OVER for level in levels]
    known = np.column_stack([np.array(colours), opacity])
    return np.vstack([known, [*UNKNOWN, 60]]).astype(np.uint8)


def rgba(strength: Array) -> Array:
    return palette()[index_of(strength)]


def png(strength: Array) -> bytes:
    """[height, width] of -1 to 1, a pixel a value."""
    picture = Image.fromarray(index_of(strength), "P")
    table = palette()
    picture.putpalette(table[:, :3].tobytes())
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True, transparency=table[:, 3].tobytes())
    return out.getvalue()


def data_uri(strength: Array) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(strength)).decode()}"
