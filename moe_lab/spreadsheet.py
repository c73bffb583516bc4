"""CSV that no spreadsheet takes for formulas."""

import csv
from typing import IO, Any

from moe_lab.cli import printable


def columns(table: list[dict[str, Any]]) -> list[str]:
    """Every column that occurs, in the order of first appearance."""
    return list(dict.fromkeys(name for row in table for name in row))


def write_csv(table: list[dict[str, Any]], file: IO[str]) -> None:
    """Undefined numbers are empty cells. Text that a spreadsheet would take for a formula gets a leading quote."""
    names = columns(table)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([harmless(name) for name in names])
    writer.writerows([harmless(row.get(name)) for name in names] for row in table)


def harmless(cell: Any) -> Any:
    """Text that no spreadsheet takes for a formula and no terminal for a command."""
    if not isinstance(cell, str):
        return cell
    # Some spreadsheets look behind leading blanks.
    formula = cell.lstrip().startswith(("=", "+", "-", "@")) or cell.startswith(("\t", "\r"))
    return f"'{printable(cell)}" if formula else printable(cell)
