"""`moe-lab losses`: what each balance loss is worth, here and elsewhere, and how to convert a coefficient."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.cli import arguments, complain, printable, quiet_pipe
from moe_lab.reading import lines, must_be_regular

if TYPE_CHECKING:
    from torch import Tensor

    from moe_lab.worth import Case, Loss

ABOUT = """What each balance loss adds to the training loss with a coefficient of 1, here and in other frameworks: on
random logits (balanced, skewed, collapsed onto k experts, and layers that use different halves of the experts) or on
your own. Its gradient, what of that reaches a dead expert, and the factor that turns a published coefficient into a
weight here."""
SIZES = {  # option: its default, and what it is
    "experts": (8, "experts of a layer"),
    "k": (2, "experts per token"),
    "tokens": (4096, "tokens of a layer, taken as one sequence"),
    "layers": (2, "MoE layers (default 2); a file of rows holds so many, one behind the other (default 1)"),
    "seed": (0, "of the random logits, and of what losses draw beside them"),
}
MOST_NUMBERS = 1 << 24


def main(argv: list[str]) -> int:
    parser = arguments("losses", ABOUT)
    for name, (default, what) in SIZES.items():
        shown = "" if "default" in what else f" (default {default})"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what + shown)
    parser.add_argument("--logits", type=Path, metavar="FILE", help=".npy of [T, E] or [L, T, E]; CSV; JSON lines")
    parser.add_argument("--json", action="store_true", help="all numbers, the gradients of every situation among them")
    asked = parser.parse_args(argv)
    try:
        situations = _cases(asked)
        L, T, E = next(iter(situations.values())).logits_LTE.shape
        k = SIZES["k"][0] if asked.k is None else asked.k
        if not 1 <= k <= E:
            raise ValueError(f"--k {k}: 1 to {E} of {E} experts can be chosen")
    except ValueError as error:
        return complain([str(error)])
    except OSError as error:
        return complain([f"{asked.logits}: {error.strerror}"])
    quiet_pipe()
    told = {"experts": E, "k": k, "layers": L, "tokens": T, "losses": list(_rows(situations, k))}
    if asked.json:
        print(json.dumps(told, indent=1))
    else:
        print(*_table(told, list(situations)), sep="\n")
    return 0


def _cases(asked: Namespace) -> "dict[str, Case]":
    sizes = {name: default if (n := getattr(asked, name)) is None else n for name, (default, _) in SIZES.items()}
    if not 0 <= sizes["seed"] < 1 << 63:
        raise ValueError(f"--seed {sizes['seed']}: from 0 to 2^63 - 1")
    if asked.logits is not None:
        logits_LTE = _read(asked)
        from moe_lab.worth import given

        return {"given": given(logits_LTE, sizes["seed"])}
    if wrong := [f"--{name} {n}: at least 1" for name, n in sizes.items() if n < 1 and name != "seed"]:
        raise ValueError(wrong[0])
    E, k, T, L, seed = sizes.values()
    if E * T * L > MOST_NUMBERS:
        raise ValueError(f"--experts x --tokens x --layers: {E * T * L:,} logits, {MOST_NUMBERS:,} at most")
    if E * (E + 1) * L > MOST_NUMBERS:
        raise ValueError(f"--experts x --experts x --layers: {E * (E + 1) * L:,} weights, {MOST_NUMBERS:,} at most")
    from moe_lab.worth import situations

    return situations(E, k, T, L, seed)


def _read(asked: Namespace) -> "Tensor":
    """[L, T, E] in float64."""
    import numpy as np
    import torch

    path, name = asked.logits, printable(str(asked.logits))
    if told := [f"--{option}" for option in ("experts", "tokens") if getattr(asked, option) is not None]:
        raise ValueError(f"{told[0]}: {name} tells it; leave it out")
    must_be_regular(path)
    if path.suffix == ".npy":
        try:  # mapped: a header that promises more than the file holds is refused before anything is allocated
            array = np.lib.format.open_memmap(path, mode="r")  # which refuses objects
        except (ValueError, EOFError, SyntaxError, OverflowError, MemoryError) as error:
            raise ValueError(f"{name}: no .npy of numbers ({' '.join(str(error).split())[:100]})") from None
    else:
        array = np.array(list(_numbers(path, name)))
    if array.dtype.kind not in "fiu" or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"{name}: holds {array.dtype} {list(array.shape)}; numbers [T, E] or [L, T, E] are needed")
    if array.size > MOST_NUMBERS:
        raise ValueError(f"{name}: holds {array.size:,} numbers, {MOST_NUMBERS:,} at most")
    logits = torch.from_numpy(np.array(array, dtype=np.float64))
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{name}: holds numbers that are not finite")
    layers = asked.layers if asked.layers is not None else len(logits) if logits.ndim == 3 else 1
    if logits.ndim == 3 and layers != len(logits):
        raise ValueError(f"--layers {layers}: {name} holds {len(logits)}")
    if layers < 1 or (logits.ndim == 2 and len(logits) % layers):
        raise ValueError(f"--layers {layers}: must divide the {len(logits)} rows of {name}")
    return logits if logits.ndim == 3 else logits.view(layers, -1, logits.shape[1])


def _numbers(path: Path, name: str) -> Iterator[list[float]]:
    """Lines of numbers between commas, with or without the brackets of a JSON list."""
    width, total = 0, 0
    for number, line in enumerate(lines(path), 1):
        text = line.decode(errors="replace").strip().removeprefix("[").removesuffix("]")
        if not text:
            continue
        try:
            row = [float(word) for word in text.split(",")]
        except ValueError:
            raise ValueError(f"{name} line {number}: needs numbers between commas, one per expert") from None
        width, total = width or len(row), total + len(row)
        if len(row) != width:
            raise ValueError(f"{name} line {number}: {len(row)} numbers, {width} above it")
        if total > MOST_NUMBERS:
            raise ValueError(f"{name}: holds more than {MOST_NUMBERS:,} numbers")
        yield row


def _rows(situations: "dict[str, Case]", k: int) -> Iterator[dict[str, Any]]:
    """A row per loss: ours first, then those of others."""
    from moe_lab.conventions import CONVENTIONS
    from moe_lab.worth import based_on, names, ours, theirs

    L, _, E = next(iter(situations.values())).logits_LTE.shape
    for name in names():
        found = _measured(lambda case, name=name: ours(name, case, k), situations)
        yield {"where": "here", "name": name, "on": based_on(name)} | found
    for c in CONVENTIONS:
        scale = {"like": c.like or None, "factor": c.weight(E, k, L), "formula": c.factor or None}
        found = _measured(lambda case, c=c: theirs(c, case, k), situations)
        yield {"where": "there", "name": c.name, **scale, "sequence": c.sequence, "checked": c.checked} | found


def _measured(loss: "Callable[[Case], Loss | None]", situations: "dict[str, Case]") -> dict[str, Any]:
    """What it is worth in each, or "not": why nothing is."""
    from moe_lab.worth import Missing, measure

    found = {}
    try:
        for name, case in situations.items():
            if (made := loss(case)) is None:
                return {"not": "moves a bias, no loss"}
            found[name] = vars(measure(made))
    except Missing as missing:
        return {"not": f"needs {missing}"}
    return found


HOW_TO_READ = """
Indented rows have the gradient of ours above them, times x: a coefficient c
there is a weight of x c here. Values: what a coefficient of 1 adds to the loss.
s: each sequence by itself (here one). gradient{}: its norm over all
logits; to dead{}: over experts without a token.
Other words under x: what ours is worth on, where not on router=topk.
  noisy_topk  its choice, with noise of 0.693 N(0, 1), as it starts
  relu        its gates, the positive logits; lambda is the first, 1e-8"""
MADE = """\
  weights     a layer that makes such logits; the gradient is over its weights.
              Router rows: a unit direction each, and along one direction that
              all tokens share, the offset of the expert's logits. Experts: one
              neuron, like the row."""


def _table(told: dict[str, Any], situations: list[str]) -> Iterator[str]:
    steep, dead = ("skewed", "collapse") if "skewed" in situations else ("given", "given")
    rows = told["losses"]
    name_width = 2 + max(len(row["name"]) for row in rows)

    def line(name: str, cells: list[str], x: str = "") -> str:
        return f"{name:<{name_width}}{''.join(f'{cell:>9}' for cell in cells)}  {x}".rstrip()

    def measured(row: dict[str, Any], indent: str = "", x: str = "") -> str:
        values = [_value(row[s]["value"]) for s in situations]
        return line(indent + row["name"], [*values, _small(row[steep]["gradient"]), _small(row[dead]["dead"])], x)

    yield "experts {experts}, k {k}, layers {layers}, tokens {tokens:,} in each".format_map(told)
    yield line("", [*situations, "gradient", "to dead"], "x")
    ours = {row["name"]: row for row in rows if row["where"] == "here"}
    theirs = [row for row in rows if row["where"] == "there"]
    for name, row in ours.items():
        if "not" not in row:
            yield measured(row, x="" if row["on"] == "topk" else row["on"])
            for other in theirs:
                if other["like"] == name:
                    yield measured(other, "  ", _times(other))
    yield "no loss here has their gradient:"
    yield from (measured(row, "  ", "s" * row["sequence"]) for row in theirs if row["like"] not in ours)
    yield from (f"{name:<{name_width}}  {row['not']}" for name, row in ours.items() if "not" in row)
    yield HOW_TO_READ.format(*(("", "") if steep == "given" else (" (skewed)", " (collapse)")))
    if steep != "given":
        yield MADE


def _times(row: dict[str, Any]) -> str:
    number = f"{row['factor']:.3g}"
    formula = "" if row["formula"] == number else f" = {row['formula']}"
    return number + formula + " s" * row["sequence"]


def _value(x: float) -> str:
    return "0" if abs(x) < 1e-12 else f"{x:#.4g}" if 0.001 <= abs(x) < 10_000 else f"{x:.1e}"


def _small(x: float | None) -> str:
    return "-" if x is None else "0" if abs(x) < 1e-15 else f"{x:.1e}"
