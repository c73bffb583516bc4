"""`moe-lab export RUN`: metrics.jsonl as one table for pandas, polars, R or a spreadsheet."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_lab.cli import arguments, complain, printable, quiet_pipe
from moe_lab.reading import Damaged
from moe_lab.recorded import read
from moe_lab.spreadsheet import columns, write_csv

ABOUT = """One row per log row and one column per number: scalars keep their name (loss, moe/load_cv/worst), arrays get
a column per layer, moe/load_cv[0], and per layer and expert, moe/selected[0][3]. --long gives one row per number
instead, with the columns step, metric, layer, expert, other (the second expert or the domain of a matrix) and value,
ready for a groupby (arrays of numbers only). A run whose router sees later tokens has a column that says so, leaks:
its losses compare with no causal model's."""


def main(argv: list[str]) -> int:
    parser = arguments("export", ABOUT)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--format", choices=("csv", "parquet"), help="default: that of --out's ending, else csv")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/metrics.csv or .parquet; - for standard output")
    parser.add_argument("--long", action="store_true", help="one row per number")
    asked = parser.parse_args(argv)
    form = asked.format or ("parquet" if str(asked.out).endswith(".parquet") else "csv")
    try:
        run = read(asked.run)
    except ValueError as error:
        return complain([str(error)], 4 if isinstance(error, Damaged) else 2)
    if not run.rows:
        return complain([f"{asked.run}: no rows in metrics.jsonl yet"])
    table = list(long(run.rows)) if asked.long else [wide(row) for row in run.rows]
    if run.env.get("leaks"):
        table = [row | {"leaks": True} for row in table]
    quiet_pipe()
    if asked.out == "-":
        if form == "parquet":
            return complain(["parquet is binary; give it a file: --out FILE"])
        write_csv(table, sys.stdout)
        return 0
    out = Path(asked.out) if asked.out else asked.run / f"metrics.{form}"
    if not asked.out and out.is_symlink():
        return complain([f"{out}: is a link; say --out to write where it leads"], 4)
    try:
        _write(table, out, form)
    except OSError as error:
        return complain([f"{out}: {error.strerror or error}"], 5)
    except ModuleNotFoundError as error:
        return complain([f"parquet needs {error.name}: pip install pyarrow"], 5)
    print(f"{printable(str(out))}: {len(table)} rows, {len(columns(table))} columns")
    return 0


def wide(row: dict[str, Any]) -> dict[str, Any]:
    """One row with a column per array element."""
    return {f"{name}{''.join(f'[{i}]' for i in at)}": v for name, value in row.items() for at, v in _elements(value)}


def long(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """step, metric, layer, expert, other, value: one row per number; text (verdicts) is left out."""
    for row in rows:
        for name, value in row.items():
            for at, v in _elements(value):
                if name != "step" and not isinstance(v, str):
                    layer, expert, other = (*at, None, None, None)[:3]
                    where = {"layer": layer, "expert": expert, "other": other}
                    yield {"step": row["step"], "metric": name, **where, "value": v}


def _elements(value: Any, at: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _elements(inner, (*at, i))
    else:
        yield at, value


def _write(table: list[dict[str, Any]], out: Path, form: str) -> None:
    if form == "csv":
        with out.open("w", newline="", encoding="utf-8") as file:
            write_csv(table, file)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array([row.get(name) for row in table]) for name in columns(table)}
    undefined = {name: a.cast(pa.float64()) for name, a in arrays.items() if pa.types.is_null(a.type)}
    pq.write_table(pa.table(arrays | undefined), out)
