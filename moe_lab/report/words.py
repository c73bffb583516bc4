"""Words and numbers as a report shows them. Names and errors come from anywhere: they are data."""

import math
import re
from collections.abc import Iterable, Mapping

from moe_lab.cli import cut, printable
from moe_lab.secrecy import hide

LONGEST = 300


def clean(text: str, most: int = LONGEST) -> str:
    """One line without control characters, secrets or bytes that are no text."""
    return cut(printable(hide(text)), most).strip()


def slug(text: str, taken: Iterable[str] = ()) -> str:
    """`[a-z0-9_-]{1,40}`, a word for a file's name or an anchor that none of `taken` is."""
    word = re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-")[:32] or "study"
    names = [word, *(f"{word}-{i}" for i in range(2, 1000))]
    return next(name for name in names if name not in set(taken))


def number(x: float | None, digits: int = 3) -> str:
    """With so many decimals, less where they say nothing; the minus is one, and thousands are set apart."""
    if x is None or not math.isfinite(x):
        return "–"
    text = f"{x:,.0f}" if abs(x) >= 10_000 or digits == 0 else f"{x:.{digits}f}"
    return f"−{text[1:]}" if text.startswith("-") and float(text.replace(",", "")) else text.lstrip("-")


def significant(x: float | None) -> str:
    """To three significant digits."""
    if x is None or not math.isfinite(x):
        return "–"
    text = f"{x:.3g}" if 1e-4 <= abs(x) < 1e4 or x == 0 else f"{x:.2e}"
    return text.replace("-", "−")


def spread(of: Mapping[str, float], digits: int = 3) -> str:
    """What a number is in each arm, in a sentence: all of a few, else lowest, highest and median."""
    known = {arm: x for arm, x in of.items() if math.isfinite(x)}
    if not known:
        return "undefined in all arms"
    if len(known) <= 4:
        return ", ".join(f"{number(x, digits)} in {arm}" for arm, x in known.items())
    ranked = sorted(known, key=lambda arm: known[arm])
    low, middle, high = ranked[0], known[ranked[len(ranked) // 2]], ranked[-1]
    return (
        f"from {number(known[low], digits)} in {low} to {number(known[high], digits)} in {high}, "
        f"median {number(middle, digits)} over {len(known)} arms"
    )
